"""The transformer block: two gated residual units, attention and MLP, modulated by the condition (adaLN)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdm_scale.config import ModelConfig
from rdm_scale.models.gates import ResidualGate
from rdm_scale.models.layers import LayerFactory

NORM_EPS = 1e-6


class SideInputs(NamedTuple):
    """What accompanies the residual stream from block to block."""

    condition: Tensor  # [B, D]


def modulated_norm(z: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """LayerNorm without weights, then x * (1 + scale) + shift; in the stream's type, returned in the branch's."""
    x = F.layer_norm(z, z.shape[-1:], eps=NORM_EPS)
    return (x * (1 + scale_BD.to(x.dtype)) + shift_BD.to(x.dtype)).to(shift_BD.dtype)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens. The rows of qkv are ordered (head, q/k/v, channel), so that a
    contiguous part of them holds whole heads."""

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        super().__init__()
        self.head_size = config.hidden_size // config.num_heads
        self.qkv = layers.column(config.hidden_size, 3 * config.hidden_size)
        self.out: Any = layers.row(config.hidden_size, config.hidden_size)

    @property
    def last(self) -> Any:
        """The layer whose bias is left to the gate."""
        return self.out

    def forward(self, x_SBD: Tensor) -> Tensor:
        qkv = self.qkv(x_SBD)
        S, B, width = qkv.shape  # width: of the heads that are here
        qkv = qkv.view(S, B, width // (3 * self.head_size), 3, self.head_size)
        q, k, v = qkv.permute(3, 1, 2, 0, 4).unbind(0)
        heads_BHSd = F.scaled_dot_product_attention(q, k, v)
        return self.out(heads_BHSd.permute(2, 0, 1, 3).reshape(S, B, -1))


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

    def forward(self, x_SBD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_SBD), approximate="tanh"))


class ResidualUnit(nn.Module):
    """One residual branch with its gate: z + alpha * F(z; c) + beta (the mrs-unit of Neural-RDM).

    `vectors` computes what acts alike on all tokens, `forward` works on the tokens: with tokens split over ranks, all
    that is between the two is where a gradient has to be summed over them.
    """

    def __init__(self, branch: Attention | Mlp, gate: ResidualGate) -> None:
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

    def forward(
        self, z_SBD: Tensor, shift_BD: Tensor, scale_BD: Tensor, beta: Tensor, alpha: Tensor | None = None
    ) -> Tensor:
        branch_SBD = self.branch(modulated_norm(z_SBD, shift_BD, scale_BD)).to(z_SBD.dtype)
        z_SBD = z_SBD + branch_SBD if alpha is None else torch.addcmul(z_SBD, alpha, branch_SBD)
        return z_SBD + beta


class Block(nn.Module):
    """An attention unit and an MLP unit. `modulation` maps the condition to (shift, scale[, g]) of each in turn."""

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        super().__init__()
        self.attention = ResidualUnit(Attention(config, layers), ResidualGate(config))
        self.mlp = ResidualUnit(Mlp(config, layers), ResidualGate(config))
        self.onto_tokens = layers.onto_tokens
        self.width = config.hidden_size
        vectors = self.attention.modulations + self.mlp.modulations
        self.modulation = layers.gathered(self.width, vectors * self.width)

    def forward(self, z_SBD: Tensor, side: SideInputs) -> Tensor:
        modulation = self.modulation(F.silu(side.condition)).split(self.width, dim=-1)
        first = self.attention.vectors(modulation[: self.attention.modulations], z_SBD.dtype)
        second = self.mlp.vectors(modulation[self.attention.modulations :], z_SBD.dtype)
        vectors = self.onto_tokens(first + second)
        z_SBD = self.attention(z_SBD, *vectors[: len(first)])
        return self.mlp(z_SBD, *vectors[len(first) :])
