"""The transformer block: two gated residual units, attention and MLP, modulated by the condition (adaLN)."""

from typing import NamedTuple

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
        self.out = layers.row(config.hidden_size, config.hidden_size)

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
        self.down = layers.row(config.mlp_size, config.hidden_size)

    def forward(self, x_SBD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_SBD), approximate="tanh"))


class ResidualUnit(nn.Module):
    """One residual branch with its gate: z + alpha * F(z; c) + beta (the mrs-unit of Neural-RDM)."""

    def __init__(self, branch: nn.Module, gate: ResidualGate) -> None:
        super().__init__()
        self.branch = branch
        self.gate = gate

    @property
    def modulations(self) -> int:
        """How many vectors [B, D] of the condition it takes: shift, scale and, with a conditional gate, g."""
        return 3 if self.gate.conditional else 2

    def forward(self, z_SBD: Tensor, shift_BD: Tensor, scale_BD: Tensor, gate_BD: Tensor | None = None) -> Tensor:
        return self.gate(z_SBD, self.branch(modulated_norm(z_SBD, shift_BD, scale_BD)), gate_BD)


class Block(nn.Module):
    """An attention unit and an MLP unit. `modulation` maps the condition to (shift, scale[, g]) of each in turn."""

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        super().__init__()
        self.attention = ResidualUnit(Attention(config, layers), ResidualGate(config))
        self.mlp = ResidualUnit(Mlp(config, layers), ResidualGate(config))
        self.width = config.hidden_size
        vectors = self.attention.modulations + self.mlp.modulations
        self.modulation = layers.gathered(self.width, vectors * self.width)

    def forward(self, z_SBD: Tensor, side: SideInputs) -> Tensor:
        vectors = self.modulation(F.silu(side.condition)).split(self.width, dim=-1)
        z_SBD = self.attention(z_SBD, *vectors[: self.attention.modulations])
        return self.mlp(z_SBD, *vectors[self.attention.modulations :])
