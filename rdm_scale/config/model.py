"""Configuration of the model, and quantities that follow from it."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

from pydantic import Field, model_validator

from rdm_scale.config.section import Section

AttentionScope = Literal["full", "spatial", "temporal"]
TIMESTEP_FREQUENCIES = 256  # size of the timestep embedding: half cosines, half sines, as in DiT


class GateParts(NamedTuple):
    """Learnable parts of a residual structure, alpha = r (m a + g(c)) and beta = r m b (models/gates.py)."""

    a: int  # size of a: 0 (none), 1 or the hidden size
    a_start: float  # initial value of a
    b: int  # size of b, which starts at 0
    conditional: bool  # True if g(c) is added


class InputConfig(Section):
    """Shape [C, T, H, W] of the latents (keys `model.input.*`)."""

    channels: int = Field(4, ge=1, description="latent channels C")
    frames: int = Field(1, ge=1, description="latent frames T; 1 for images")
    height: int = Field(32, ge=1, description="latent height H")
    width: int = Field(32, ge=1, description="latent width W")


class GateConfig(Section):
    """Residual gates of neural_rdm (keys `model.gate.*`)."""

    multiplier: float = Field(1.0, gt=0, description="m0 of the fixed branch multiplier m(L) = m0 * L^-p")
    exponent: float = Field(
        0.5, ge=0, description="p of m(L) = m0 * L^-p; L is the number of residual branches (at base_depth, if given)"
    )
    per_channel: bool = Field(True, description="gates a and b per channel; false: one scalar each per branch")
    conditional: bool = Field(True, description="add g(c), a function of the condition, to the gate m * a")


class TextConfig(Section):
    """Sizes of encoded captions (keys `model.text.*`)."""

    width: int = Field(768, ge=1, description="with condition=text: channels of the text encoder's token vectors")
    pooled_width: int = Field(768, ge=1, description="with condition=text: channels of its pooled vector")


class ModelConfig(Section):
    """Architecture of the model (keys `model.*`)."""

    input: InputConfig = InputConfig()
    patch_size: tuple[int, int, int] = Field((1, 2, 2), description="size [t, h, w] of the latent patch of one token")
    hidden_size: int = Field(384, ge=8, description="width D of the residual stream")
    depth: int = Field(
        12,
        ge=1,
        description="number of blocks, each attention and MLP; factorized: spatial and temporal blocks together",
    )
    base_depth: int | None = Field(
        None,
        ge=1,
        description="depth at which optimizer.* was tuned; branches and epsilon are scaled from it to this depth; "
        "null: this depth",
    )
    base_width: int | None = Field(
        None,
        ge=8,
        description="hidden_size at which optimizer.* was tuned; learning rates, weight decay and initialization "
        "are scaled from it to this hidden_size; null: this hidden_size",
    )
    num_heads: int = Field(6, ge=1, description="attention heads; must divide hidden_size")
    mlp_ratio: float = Field(4.0, gt=0, description="width of the MLP divided by hidden_size")
    residual: Literal["plain", "rezero", "layerscale", "adaln_zero", "neural_rdm"] = Field(
        "neural_rdm", description="residual structure of every branch; gate.* applies to neural_rdm only"
    )
    gate: GateConfig = GateConfig()
    stacking: Literal["flow", "u"] = Field(
        "flow",
        description="how blocks are connected; flow: a chain; u: a chain and long skips from block i to depth-1-i",
    )
    attention: Literal["joint", "factorized"] = Field(
        "joint",
        description="joint: full attention over all tokens; factorized: blocks alternate between spatial attention "
        "(within a frame) and temporal attention (over all frames at one location), as in Latte",
    )
    positions: Literal["sincos", "rotary"] = Field(
        "sincos",
        description="position embedding; sincos: fixed, added to the tokens; rotary: axial RoPE of queries and keys",
    )
    qk_norm: bool = Field(
        False, description="RMS normalization of the queries and keys of each head, with learned scales"
    )
    condition: Literal["none", "class", "text"] = Field("class", description="what the model is conditioned on")
    text: TextConfig = TextConfig()
    num_classes: int = Field(1000, ge=1, description="number of classes, without the null class")
    learned_variance: bool = Field(
        False, description="predict the variance, too, in 2C output channels (objective ddpm only)"
    )
    timestep_spacing: Literal["dit", "diffusers"] = Field(
        "dit", description="exponents of the frequencies of the timestep embedding: i/128 (dit) or i/127 (diffusers)"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        sizes = (self.input.frames, self.input.height, self.input.width)
        for name, size, patch in zip(("frames", "height", "width"), sizes, self.patch_size, strict=True):
            if patch < 1 or size % patch:
                raise ValueError(f"model.input.{name}={size} is not divisible by its model.patch_size entry {patch}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"model.num_heads={self.num_heads} does not divide model.hidden_size={self.hidden_size}")
        if self.hidden_size % 4:
            raise ValueError(f"model.hidden_size={self.hidden_size} is not divisible by 4 (sin-cos positions in 2D)")
        axes = 3 if self.input.frames > 1 else 2
        if self.positions == "rotary" and (self.head_size % 2 or self.head_size < 2 * axes):
            raise ValueError(
                f"model.positions=rotary rotates pairs of channels along {axes} axes, and a head has {self.head_size} "
                f"channels (model.hidden_size / model.num_heads): make it even and at least {2 * axes}"
            )
        if self.attention == "factorized" and self.depth % 2:
            raise ValueError(
                f"model.depth={self.depth} is odd: with model.attention=factorized blocks come in pairs, one with "
                "spatial and one with temporal attention"
            )
        return self

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along T, H and W of a sample of the configured size."""
        return self.grid_of((self.input.frames, self.input.height, self.input.width))

    def grid_of(self, size: Sequence[int]) -> tuple[int, int, int]:
        """Tokens along T, H and W of a sample of latent size (T, H, W)."""
        T, H, W = size
        t, h, w = self.patch_size
        return T // t, H // h, W // w

    @property
    def tokens(self) -> int:
        """Number of tokens S of one sample of the configured size."""
        return math.prod(self.grid)

    def tokens_of(self, size: Sequence[int]) -> int:
        """Number of tokens of a sample of latent size (T, H, W)."""
        return math.prod(self.grid_of(size))

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    def attention_scope(self, block: int) -> AttentionScope:
        """Tokens that attend to each other in a block.

        Full: all tokens. Spatial: the tokens of a frame. Temporal: the tokens at one position in all frames.
        """
        if self.attention == "joint":
            return "full"
        return "temporal" if block % 2 else "spatial"

    def skip_source(self, block: int) -> int | None:
        """The block whose output a long skip carries to this block, or None."""
        source = self.depth - 1 - block
        return source if self.stacking == "u" and source < block else None

    def starts_skip(self, block: int) -> bool:
        """True if a long skip starts at the output of this block."""
        return self.stacking == "u" and block < self.depth - 1 - block

    @property
    def branches(self) -> int:
        """Number L of residual branches in all blocks."""
        return self._branches_at(self.depth)

    @property
    def base_branches(self) -> int:
        """Number of residual branches at `base_depth`."""
        return self._branches_at(self.base_depth or self.depth)

    def _branches_at(self, depth: int) -> int:
        skips = depth // 2 if self.stacking == "u" else 0
        return (3 if self.condition == "text" else 2) * depth + skips

    @property
    def gate_parts(self) -> GateParts:
        """Learnable parts of this model's residual structure."""
        width, gate = self.hidden_size, self.gate
        per_gate = width if gate.per_channel else 1
        return {
            "plain": GateParts(0, 0.0, 0, False),
            "rezero": GateParts(1, 0.0, 0, False),
            "layerscale": GateParts(width, _layerscale_start(self.base_depth or self.depth), 0, False),
            "adaln_zero": GateParts(0, 0.0, 0, True),
            "neural_rdm": GateParts(per_gate, 1.0, per_gate, gate.conditional),
        }[self.residual]

    @property
    def mlp_size(self) -> int:
        """Hidden size of the MLP."""
        return int(self.hidden_size * self.mlp_ratio)


def _layerscale_start(depth: int) -> float:
    """Initial scale by depth in blocks (CaiT, arXiv 2103.17239, section 4.1)."""
    return 0.1 if depth <= 18 else 1e-5 if depth <= 24 else 1e-6
