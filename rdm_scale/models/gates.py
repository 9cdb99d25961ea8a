"""Residual structures: the ways in which a branch F(z; c) joins the residual stream z.

All are one formula, z + alpha * F + beta with alpha = m * a + g(c) and beta = m * b, and differ in which parts exist:

    plain       alpha = 1
    rezero      alpha = a        a scalar per branch, starting at 0 (arXiv 2003.04887)
    layerscale  alpha = a        a per channel, starting small (CaiT, arXiv 2103.17239)
    adaln_zero  alpha = g(c)     starting at 0 (DiT, arXiv 2212.09748)
    neural_rdm  alpha = m a + g(c), beta = m b    (Neural-RDM, arXiv 2406.13215, the mrs-unit)

a and b of neural_rdm start at 1 and 0; m = m0 * L^-p is a fixed function of the number L of residual branches.
The paper's alpha is m * a and its beta m * b. Storing the product itself would break depth: Adam moves every stored
number by about the learning rate, whatever its size, and a gate of size 1/L would be thrown about.
"""

import torch
from torch import Tensor, nn

from rdm_scale.config import ModelConfig


def branch_multiplier(config: ModelConfig) -> float:
    """m(L) = m0 * L^-p, with L = 2 * depth residual branches (attention and MLP of each block)."""
    return config.gate.multiplier * (2 * config.depth) ** -config.gate.exponent


def _layerscale_start(depth: int) -> float:
    """Initial scale by depth in blocks, as CaiT section 4.1 sets it."""
    return 0.1 if depth <= 18 else 1e-5 if depth <= 24 else 1e-6


class ResidualGate(nn.Module):
    """z + alpha * F + beta; see the module's table. `a` and `b` take no weight decay."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        kind, width = config.residual, config.hidden_size
        gates_rdm = width if config.gate.per_channel else 1
        size, start, multiplier, has_b, self.conditional = {
            "plain": (0, 0.0, 1.0, False, False),
            "rezero": (1, 0.0, 1.0, False, False),
            "layerscale": (width, _layerscale_start(config.depth), 1.0, False, False),
            "adaln_zero": (0, 0.0, 1.0, False, True),
            "neural_rdm": (gates_rdm, 1.0, branch_multiplier(config), True, config.gate.conditional),
        }[kind]
        self.multiplier, self.start = multiplier, start
        self.a = nn.Parameter(torch.empty(size)) if size else None
        self.b = nn.Parameter(torch.empty(size)) if has_b else None

    def forward(self, z_SBD: Tensor, branch_SBD: Tensor, condition_gate_BD: Tensor | None) -> Tensor:
        """Joins a branch's output to the stream, in the stream's type.

        Args:
            z_SBD: residual stream [S, B, D].
            branch_SBD: output of the branch [S, B, D], in the compute type.
            condition_gate_BD: g(c) [B, D], given exactly when `conditional`.
        """
        branch_SBD = branch_SBD.to(z_SBD.dtype)
        alpha = None if self.a is None else self.multiplier * self.a.to(z_SBD.dtype)
        if condition_gate_BD is not None:
            g = condition_gate_BD.to(z_SBD.dtype)
            alpha = g if alpha is None else alpha + g
        z_SBD = z_SBD + branch_SBD if alpha is None else torch.addcmul(z_SBD, alpha, branch_SBD)
        return z_SBD if self.b is None else z_SBD + self.multiplier * self.b.to(z_SBD.dtype)
