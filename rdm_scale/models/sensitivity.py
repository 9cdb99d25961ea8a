"""Sensitivities along depth: s_i = dLoss/dz_i of the residual stream after i units, one unit after the other.

Depth is time (Neural-RDM, arXiv 2406.13215, section 3): a unit z <- z + m (a F(z) + b) is an Euler step of length m of

    dz/ds = a(s) F(z; s) + b(s)

and the sensitivity obeys the adjoint equation of that flow, backwards in depth (Chen et al. 2018, arXiv 1806.07366),

    discrete    s_i = s_{i+1} + m (a dF/dz)^T s_{i+1}
    continuous  ds/ds = -(a dF/dz)^T s

The discrete one is exactly what backpropagation computes, whatever the weights. It comes near the continuous one, with
an error of the order 1/L, where m ~ 1/L and the weights of neighbouring units are samples of smooth functions of depth.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Unit = Callable[[Tensor], Tensor]  # the stream to the stream


def trajectory(units: Sequence[Unit], z: Tensor) -> list[Tensor]:
    """The stream before, between and after the units: L + 1 tensors of z's shape, without gradients."""
    states = [z.detach()]
    with torch.no_grad():
        for unit in units:
            states.append(unit(states[-1]))
    return states


def sensitivities(units: Sequence[Unit], states: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
    """The discrete adjoint: dLoss/dz_i for i = 0 to L.

    Only one unit's graph is in memory at a time, so that it can be computed for any depth.

    Args:
        units: of the chain, L of them.
        states: the stream as `trajectory` gives it.
        gradient: dLoss/dz_L.
    """
    found = [gradient]
    for unit, z in zip(reversed(units), reversed(states[:-1]), strict=True):
        _, pulled_back = torch.autograd.functional.vjp(unit, z, found[-1])
        found.append(pulled_back)
    return found[::-1]
