"""The diffusion transformer: patches in, a chain of gated residual blocks, a prediction of the same shape out."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdm_scale.conditions import Condition, TextCondition
from rdm_scale.config import ModelConfig
from rdm_scale.models.blocks import Block, SideInputs, modulated_norm
from rdm_scale.models.embeddings import (
    PooledEmbedding,
    TimestepEmbedding,
    axial_rotation,
    patchify,
    spatial_positions,
    temporal_positions,
    unpatchify,
)
from rdm_scale.models.initialization import initialize
from rdm_scale.models.layers import LayerFactory


@dataclass(frozen=True)
class Part:
    """Which part of a model a process holds: some of its blocks, and perhaps its beginning and its end."""

    blocks: tuple[int, ...]
    embeds: bool = True
    unembeds: bool = True

    @staticmethod
    def whole(config: ModelConfig) -> "Part":
        return Part(tuple(range(config.depth)))


class Head(nn.Module):
    """Modulated norm and a linear layer from the stream to patches."""

    def __init__(self, width: int, outputs: int, layers: LayerFactory) -> None:
        super().__init__()
        self.modulation = layers.gathered(width, 2 * width)
        self.out = nn.Linear(width, outputs)

    def forward(self, z_SBD: Tensor, side: SideInputs) -> Tensor:
        shift_BD, scale_BD = self.modulation(F.silu(side.condition)).chunk(2, dim=-1)
        return self.out(modulated_norm(z_SBD, shift_BD, scale_BD))


class DiffusionTransformer(nn.Module):
    """DiT (arXiv 2212.09748) with the residual structure of the configuration; `adaln_zero` is DiT itself.

    The stream z is [S, B, D], tokens first, in `residual_dtype`; branches compute in the type of their weights.
    `embed`, each entry of `blocks`, and `unembed` are separate steps, so that a pipeline can place them; with a `part`
    the model has only some of them, under the names that they have in the whole.
    """

    pos_spatial: Tensor
    pos_temporal: Tensor

    def __init__(self, config: ModelConfig, layers: LayerFactory, part: Part | None = None) -> None:
        super().__init__()
        self.config, self.layers = config, layers
        self.residual_dtype = torch.float32
        part = part or Part.whole(config)
        self.tables = _tables_of(config, part)
        self.set_positions()
        if part.embeds:
            self._build_embeddings()
        self.blocks = nn.ModuleDict({str(i): Block(config, layers, i) for i in part.blocks})
        if part.unembeds:
            channels = config.input.channels * (2 if config.learned_variance else 1)
            self.head = Head(config.hidden_size, channels * math.prod(config.patch_size), layers)

    def _build_embeddings(self) -> None:
        config = self.config
        size, width = config.input, config.hidden_size
        self.patch_embed = nn.Linear(size.channels * math.prod(config.patch_size), width)
        self.timestep_embed = TimestepEmbedding(width, config.timestep_spacing)
        self.class_embed = nn.Embedding(config.num_classes + 1, width) if config.condition == "class" else None
        self.text_embed = PooledEmbedding(config.text.pooled_width, width) if config.condition == "text" else None

    def set_positions(self, device: torch.device | None = None) -> None:
        """Computes the fixed position tables that this part of the model uses, on the device given."""
        (t, h, w), size, width = self.config.patch_size, self.config.input, self.config.hidden_size
        with torch.device(device or torch.get_default_device()):
            if "pos_spatial" in self.tables:
                self.register_buffer("pos_spatial", spatial_positions(width, size.height // h, size.width // w), False)
            if "pos_temporal" in self.tables:
                self.register_buffer("pos_temporal", temporal_positions(width, size.frames // t), False)

    def forward(self, latents: Tensor, timesteps: Tensor, condition: Condition = None) -> Tensor:
        """Predicts noise or velocity.

        Args:
            latents: [B, C, T, H, W], normalized and noised; of any size that patches divide.
            timesteps: [B], 0 to 1000 (flow: 1000 * t).
            condition: int64 labels [B], `num_classes` being the null class; a TextCondition; or None, as configured.

        Returns:
            [B, C, T, H, W] in fp32, or [B, 2C, T, H, W] with learned variance.
        """
        z_SBD, side = self.embed(latents, timesteps, condition)
        z_SBD = self.run_blocks(map(int, self.blocks), z_SBD, side)
        return self.unembed(z_SBD, side, latents.shape[2:])

    def embed(self, latents: Tensor, timesteps: Tensor, condition: Condition) -> tuple[Tensor, SideInputs]:
        """Tokens [S, B, D] with positions, and what accompanies them."""
        grid = self.config.grid_of(latents.shape[2:])
        tokens = patchify(latents, self.config.patch_size).to(self.patch_embed.weight.dtype)
        z_SBD = self.patch_embed(tokens).to(self.residual_dtype)
        if "pos_spatial" in self.tables:
            z_SBD = z_SBD + self._positions(grid).to(self.residual_dtype)[:, None]
        condition_BD = self.timestep_embed(timesteps)
        if self.class_embed is not None:
            condition_BD = condition_BD + self.class_embed(condition)
        text = condition if isinstance(condition, TextCondition) else None
        if self.text_embed is not None:
            assert text is not None, "a model with text condition takes a TextCondition"
            condition_BD = condition_BD + self.text_embed(text.pooled)
        return self.layers.split_tokens(z_SBD), self.side_inputs(condition_BD, grid, text)

    def side_inputs(
        self, condition_BD: Tensor, grid: tuple[int, int, int], text: TextCondition | None = None
    ) -> SideInputs:
        """What accompanies the stream of samples of so many tokens along T, H and W."""
        config, rotation = self.config, None
        if config.positions == "rotary":
            rotation = axial_rotation(config.head_size, grid, config.input.frames > 1).to(condition_BD.device)
        return SideInputs(condition_BD, grid, text, rotation)

    def run_blocks(
        self, numbers: Iterable[int], z_SBD: Tensor, side: SideInputs, skips: dict[int, Tensor] | None = None
    ) -> Tensor:
        """The stream after some of the blocks. `skips` are long skips by the block that they start from: those that
        blocks here end are taken out, those that blocks here start and do not end put in."""
        skips = {} if skips is None else skips
        for i in numbers:
            if i == 1 and self.config.attention == "factorized":
                z_SBD = self._at_times(z_SBD, side.grid)
            source = self.config.skip_source(i)
            z_SBD = self.blocks[str(i)](z_SBD, side, None if source is None else skips.pop(source))
            if self.config.starts_skip(i):
                skips[i] = z_SBD
        return z_SBD

    def unembed(self, z_SBD: Tensor, side: SideInputs, size: Sequence[int]) -> Tensor:
        """The stream to a prediction in fp32, for latents of size (T, H, W)."""
        tokens = self.head(self.layers.join_tokens(z_SBD), side).float()
        return unpatchify(tokens, self.config.patch_size, size)

    def _positions(self, grid: tuple[int, int, int]) -> Tensor:
        """[S, D] that go onto the tokens of the embedding: where and, unless a later block adds it, when."""
        spatial = self._spatial(grid).expand(grid[0], -1, -1)
        if "pos_temporal" in self.tables and self.config.attention == "joint":
            spatial = spatial + self._temporal(grid)[:, None]
        return spatial.flatten(0, 1)

    def _at_times(self, z_SBD: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Factorized attention: the frames' positions come before the first block that works along time (Latte)."""
        if "pos_temporal" not in self.tables:
            return z_SBD
        when_SD = self._temporal(grid).repeat_interleave(grid[1] * grid[2], dim=0)
        return z_SBD + self.layers.split_tokens(when_SD[:, None].to(z_SBD.dtype))

    def _spatial(self, grid: tuple[int, int, int]) -> Tensor:
        """[H * W, D]. The tables are those of the configuration's size; other sizes count patches in the same way,
        from the corner and from the first frame."""
        if grid[1:] == self.config.grid[1:]:
            return self.pos_spatial
        return spatial_positions(self.config.hidden_size, *grid[1:]).to(self.pos_spatial.device)

    def _temporal(self, grid: tuple[int, int, int]) -> Tensor:
        """[T, D]."""
        if grid[0] == self.config.grid[0]:
            return self.pos_temporal
        return temporal_positions(self.config.hidden_size, grid[0]).to(self.pos_temporal.device)


def _tables_of(config: ModelConfig, part: Part) -> set[str]:
    """The position tables that a part of a model uses."""
    if config.positions == "rotary":
        return set()
    tables = {"pos_spatial"} if part.embeds else set()
    adds_times = 1 in part.blocks if config.attention == "factorized" else part.embeds
    return tables | ({"pos_temporal"} if adds_times and config.input.frames > 1 else set())


def build_model(
    config: ModelConfig, seed: int = 0, layers: LayerFactory | None = None, part: Part | None = None
) -> DiffusionTransformer:
    """The model of a configuration, or a part of it, initialized from `seed`; on the meta device it has shapes only."""
    model = DiffusionTransformer(config, layers or LayerFactory(), part)
    if not next(model.parameters()).is_meta:
        initialize(model, seed, config)
    return model
