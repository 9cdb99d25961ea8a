"""The transformer block: gated residual units, attention and MLP at least, modulated by the condition (adaLN)."""

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdm_scale.conditions import TextCondition
from rdm_scale.config import AttentionScope, ModelConfig
from rdm_scale.models.embeddings import rotated
from rdm_scale.models.gates import ResidualGate
from rdm_scale.models.layers import LayerFactory

NORM_EPS = 1e-6


class SideInputs(NamedTuple):
    """What accompanies the residual stream from block to block."""

    condition: Tensor  # [B, D]
    grid: tuple[int, int, int]  # tokens along T, H and W
    text: TextCondition | None = None
    rotation: Tensor | None = None  # [2, S, head size / 2]: cosines and sines, for rotary positions


def modulated_norm(z: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """LayerNorm without weights, then x * (1 + scale) + shift; in the stream's type, returned in the branch's."""
    x = F.layer_norm(z, z.shape[-1:], eps=NORM_EPS)
    return (x * (1 + scale_BD.to(x.dtype)) + shift_BD.to(x.dtype)).to(shift_BD.dtype)


class QueryKeyNorm(nn.Module):
    """Queries and keys [..., channel] of each head at unit root mean square, times learned scales of the channels
    (arXiv 2302.05442, section 2; as RMS norm in arXiv 2403.03206)."""

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        super().__init__()
        self.onto_heads = layers.onto_heads
        self.q_scale = nn.Parameter(torch.empty(config.head_size))
        self.k_scale = nn.Parameter(torch.empty(config.head_size))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q_scale, k_scale = self.onto_heads([self.q_scale, self.k_scale])
        return _rms_norm(q, q_scale), _rms_norm(k, k_scale)


class DotProductAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v over the last dimension but one; a module, so that recompute can tell it apart."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens, over those of a frame, or over those of a place in all frames.

    The rows of qkv are ordered (head, q/k/v, channel), so that a contiguous part of them holds whole heads.
    """

    def __init__(self, config: ModelConfig, layers: LayerFactory, among: AttentionScope) -> None:
        super().__init__()
        self.among = among
        self.head_size = config.head_size
        self.qkv = layers.column(config.hidden_size, 3 * config.hidden_size)
        self.attend = DotProductAttention()
        self.out: Any = layers.row(config.hidden_size, config.hidden_size)
        self.norm = QueryKeyNorm(config, layers) if config.qk_norm else None

    @property
    def last(self) -> Any:
        """The layer whose bias is left to the gate."""
        return self.out

    def forward(self, x_SBD: Tensor, side: SideInputs) -> Tensor:
        qkv = self.qkv(x_SBD)
        S, B, width = qkv.shape  # width: of the heads that are here
        frames = 1 if self.among == "full" else side.grid[0]
        qkv = qkv.view(frames, S // frames, B * width // (3 * self.head_size), 3, self.head_size)
        # In each group of tokens that attend to each other: [group, sample and head, token, channel].
        order = (1, 2, 0, 3) if self.among == "temporal" else (0, 2, 1, 3)
        q, k, v = qkv.unbind(3)
        if self.norm is not None:
            q, k = self.norm(q, k)
        if side.rotation is not None:
            rotation = side.rotation.view(2, frames, S // frames, 1, -1)
            q, k = rotated(q, rotation), rotated(k, rotation)
        heads = self.attend(*(x.permute(order) for x in (q, k, v)))
        back = (2, 0, 1, 3) if self.among == "temporal" else (0, 2, 1, 3)
        return self.out(heads.permute(back).reshape(S, B, -1))


class CrossAttention(nn.Module):
    """Multi-head attention of all tokens to those of the caption, which are normalized: encoders differ in scale."""

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.q = layers.column(config.hidden_size, config.hidden_size)
        self.kv = layers.column(config.text.width, 2 * config.hidden_size, whole=True)
        self.attend = DotProductAttention()
        self.out: Any = layers.row(config.hidden_size, config.hidden_size)
        self.norm = QueryKeyNorm(config, layers) if config.qk_norm else None

    @property
    def last(self) -> Any:
        """The layer whose bias is left to the gate."""
        return self.out

    def forward(self, x_SBD: Tensor, side: SideInputs) -> Tensor:
        assert side.text is not None
        tokens_BND = side.text.tokens
        text = F.layer_norm(tokens_BND.float(), tokens_BND.shape[-1:], eps=NORM_EPS).to(x_SBD.dtype)
        q, kv = self.q(x_SBD), self.kv(text)
        q = q.unflatten(2, (-1, self.head_size))
        k, v = kv.unflatten(2, (-1, 2, self.head_size)).unbind(3)
        if self.norm is not None:
            q, k = self.norm(q, k)
        heads_BHSd = self.attend(
            q.permute(1, 2, 0, 3), k.transpose(1, 2), v.transpose(1, 2), side.text.mask[:, None, None]
        )
        return self.out(heads_BHSd.permute(2, 0, 1, 3).flatten(2))


def _rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """Of each head's channels; in fp32, returned in the type of x."""
    return F.rms_norm(x.float(), x.shape[-1:], scale.float(), NORM_EPS).to(x.dtype)


class Mlp(nn.Module):
    """Two layers with the tanh approximation of GELU between them."""

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        super().__init__()
        self.up = layers.column(config.hidden_size, config.mlp_size)
        self.down: Any = layers.row(config.mlp_size, config.hidden_size)

    @property
    def last(self) -> Any:
        """The layer whose bias is left to the gate."""
        return self.down

    def forward(self, x_SBD: Tensor, side: SideInputs) -> Tensor:
        return self.down(F.gelu(self.up(x_SBD), approximate="tanh"))


class LongSkip(nn.Module):
    """A linear layer over [x; skip], skip being the stream as another block left it, normalized (U-ViT, arXiv
    2209.12152, whose layer takes the place of the stream; here it is a branch)."""

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        super().__init__()
        self.split_features = layers.split_features
        self.join: Any = layers.row(2 * config.hidden_size, config.hidden_size)

    @property
    def last(self) -> Any:
        """The layer whose bias is left to the gate."""
        return self.join

    def forward(self, x_SBD: Tensor, side: SideInputs, skip_SBD: Tensor) -> Tensor:
        normed_SBD = F.layer_norm(skip_SBD, skip_SBD.shape[-1:], eps=NORM_EPS).to(x_SBD.dtype)
        return self.join(self.split_features(torch.cat([x_SBD, normed_SBD], dim=-1)))


class ResidualUnit(nn.Module):
    """One residual branch with its gate: z + alpha * F(z; c) + beta (the mrs-unit of Neural-RDM).

    `vectors` computes what acts alike on all tokens, `forward` works on the tokens: with tokens split over ranks, all
    that is between the two is where a gradient has to be summed over them.
    """

    def __init__(self, branch: Attention | CrossAttention | Mlp | LongSkip, gate: ResidualGate) -> None:
        super().__init__()
        self.branch = branch
        self.gate = gate

    @property
    def modulations(self) -> int:
        """How many vectors [B, D] of the condition it takes: shift, scale and, with a conditional gate, g."""
        return 3 if self.gate.conditional else 2

    def vectors(self, modulation: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """shift and scale in the branch's type, beta and, unless it is 1, alpha in the stream's."""
        shift, scale, *g = modulation
        alpha, beta = self.gate(g[0] if g else None, self.branch.last.bias, dtype)
        return [shift, scale, beta] if alpha is None else [shift, scale, beta, alpha]

    def forward(self, z_SBD: Tensor, side: SideInputs, vectors: Sequence[Tensor], *more: Tensor) -> Tensor:
        """The stream after this branch, whose gate and modulation are `vectors`; `more` is for the branch alone."""
        shift_BD, scale_BD, beta, *rest = vectors
        alpha = rest[0] if rest else None
        branch_SBD = self.branch(modulated_norm(z_SBD, shift_BD, scale_BD), side, *more).to(z_SBD.dtype)
        z_SBD = z_SBD + branch_SBD if alpha is None else torch.addcmul(z_SBD, alpha, branch_SBD)
        return z_SBD + beta


class Block(nn.Module):
    """Residual units in a row: attention and MLP, attention to the caption between them if there is one, and before
    them, in the second half of a u stack, the long skip from the block that mirrors this one. `modulation` maps the
    condition to (shift, scale[, g]) of each in turn."""

    def __init__(self, config: ModelConfig, layers: LayerFactory, number: int) -> None:
        super().__init__()
        skips = config.skip_source(number) is not None
        self.skip = ResidualUnit(LongSkip(config, layers), ResidualGate(config)) if skips else None
        attention = Attention(config, layers, config.attention_scope(number))
        self.attention = ResidualUnit(attention, ResidualGate(config))
        text = config.condition == "text"
        self.cross_attention = ResidualUnit(CrossAttention(config, layers), ResidualGate(config)) if text else None
        self.mlp = ResidualUnit(Mlp(config, layers), ResidualGate(config))
        self.onto_tokens = layers.onto_tokens
        self.width = config.hidden_size
        vectors = sum(unit.modulations for unit in self.units())
        self.modulation = layers.gathered(self.width, vectors * self.width)

    def units(self) -> list[ResidualUnit]:
        """In the order of their work."""
        units = (self.skip, self.attention, self.cross_attention, self.mlp)
        return [unit for unit in units if unit is not None]

    def forward(self, z_SBD: Tensor, side: SideInputs, skip_SBD: Tensor | None = None) -> Tensor:
        modulation = iter(self.modulation(F.silu(side.condition)).split(self.width, dim=-1))
        by_unit = [unit.vectors([*islice(modulation, unit.modulations)], z_SBD.dtype) for unit in self.units()]
        vectors = iter(self.onto_tokens([vector for of_unit in by_unit for vector in of_unit]))
        for unit, of_unit in zip(self.units(), by_unit, strict=True):
            more = () if unit is not self.skip or skip_SBD is None else (skip_SBD,)
            z_SBD = unit(z_SBD, side, [*islice(vectors, len(of_unit))], *more)
        return z_SBD
