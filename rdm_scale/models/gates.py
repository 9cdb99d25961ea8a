"""Residual structures: gates that add a branch F(z; c) to the hidden states z.

All share the formula z + alpha * F + beta with alpha = r (m * a + g(c)) and beta = r * m * b; they differ in the terms
that exist:

    plain       alpha = r
    rezero      alpha = r a        a scalar per branch, starting at 0 (arXiv 2003.04887)
    layerscale  alpha = r a        a per channel, starting small (CaiT, arXiv 2103.17239)
    adaln_zero  alpha = r g(c)     starting at 0 (DiT, arXiv 2212.09748)
    neural_rdm  alpha = r (m a + g(c)), beta = r m b    (Neural-RDM, arXiv 2406.13215, the mrs-unit)

a and b of neural_rdm start at 1 and 0; m = m0 * L^-p is a fixed function of the number L of residual branches. r is 1,
unless the configuration names a base depth: then L in m is the base's and r is L over this model's number
(models/parameterization.py). The paper's alpha is r * m * a and its beta r * m * b. The parameters are a and b rather
than the products, because Adam changes each parameter by about the learning rate regardless of its size, which would be
too much for a gate of size 1/L.

Shapes: B samples, D hidden size.
"""

import torch
from torch import Tensor, nn

from rdm_scale.config import ModelConfig
from rdm_scale.models.parameterization import depth_ratio


def branch_multiplier(config: ModelConfig) -> float:
    """Fixed multiplier of a and b: r, and for neural_rdm r * m with m = m0 * L^-p.

    L is the number of residual branches of the base.
    """
    m = config.gate.multiplier * config.base_branches**-config.gate.exponent if config.residual == "neural_rdm" else 1.0
    return depth_ratio(config) * m


class ResidualGate(nn.Module):
    """Gate alpha and beta of z + alpha * F + beta; see the module's table. `a` and `b` take no weight decay.

    `multiplier` multiplies a and b; `ratio`, r, multiplies g(c).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        parts = config.gate_parts
        self.start, self.conditional = parts.a_start, parts.conditional
        self.multiplier, self.ratio = branch_multiplier(config), depth_ratio(config)
        self.a = nn.Parameter(torch.empty(parts.a)) if parts.a else None
        self.b = nn.Parameter(torch.empty(parts.b)) if parts.b else None

    def forward(
        self, condition_gate_BD: Tensor | None, bias_D: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor]:
        """Compute (alpha, beta), each [D], [B, D] or a scalar; beta includes the bias of the branch's last layer.

        alpha is None where it is 1.

        Args:
            condition_gate_BD: g(c) [B, D], given exactly when `conditional`.
            bias_D: bias of the branch's last layer, which F leaves out.
            dtype: dtype of the hidden states, used for the computation.
        """
        alpha = None if self.a is None else self.multiplier * self.a.to(dtype)
        if condition_gate_BD is not None:
            g = condition_gate_BD.to(dtype)
            g = g if self.ratio == 1 else self.ratio * g
            alpha = g if alpha is None else alpha + g
        elif alpha is None and self.ratio != 1:
            alpha = torch.full_like(bias_D, self.ratio, dtype=dtype)
        beta = bias_D.to(dtype) if alpha is None else alpha * bias_D.to(dtype)
        return alpha, beta if self.b is None else beta + self.multiplier * self.b.to(dtype)
