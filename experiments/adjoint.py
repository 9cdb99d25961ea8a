"""Sensitivities along depth: dLoss/dz_i of the hidden states after i residual branches, and their continuous limit.

Depth is time (Neural-RDM, arXiv 2406.13215, section 3): a residual branch z <- z + m (a F(z) + b) is an Euler step of
length m of

    dz/ds = a(s) F(z; s) + b(s)

and the sensitivity s_i = dLoss/dz_i obeys the adjoint equation of that flow, backwards in depth (Chen et al. 2018,
arXiv 1806.07366),

    discrete    s_i = s_{i+1} + m (a dF/dz)^T s_{i+1}
    continuous  ds/ds = -(a dF/dz)^T s

The discrete equation is what backpropagation computes, for any weights. It approaches the continuous one with an error
of order 1/L where m ~ 1/L and the weights of successive branches are samples of smooth functions of depth.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchdiffeq import odeint_adjoint

from tests.support.smooth_chain import SmoothChain

POSITIONS = (0.0, 0.25, 0.5, 0.75)  # in depth, of the comparison

Step = Callable[[Tensor], Tensor]  # a residual branch or block: hidden states to hidden states


def trajectory(steps: Sequence[Step], z: Tensor) -> list[Tensor]:
    """Hidden states before, between and after the steps: L + 1 tensors of z's shape, without gradients."""
    states = [z.detach()]
    with torch.no_grad():
        for step in steps:
            states.append(step(states[-1]))
    return states


def sensitivities(steps: Sequence[Step], states: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
    """The discrete adjoint: dLoss/dz_i for i = 0 to L.

    Only one step's graph is in memory at a time, so that the depth is not limited.

    Args:
        steps: the chain, L steps.
        states: the hidden states that `trajectory` returns.
        gradient: dLoss/dz_L.
    """
    found = [gradient]
    for step, z in zip(reversed(steps), reversed(states[:-1]), strict=True):
        _, pulled_back = torch.autograd.functional.vjp(step, z, found[-1])
        found.append(pulled_back)
    return found[::-1]


class _Flow(nn.Module):
    """Velocity of a chain's flow, as torchdiffeq calls it."""

    def __init__(self, chain: SmoothChain) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, s: Tensor, z: Tensor) -> Tensor:
        return self.chain.velocity(float(s.detach()), z)


def continuous_sensitivity(chain: SmoothChain, position: float) -> Tensor:
    """dLoss/dz at `position` in [0, 1) of the chain's flow, by torchdiffeq's adjoint equation."""
    options = {"rtol": 1e-10, "atol": 1e-12, "adjoint_params": ()}
    z = chain.start
    with torch.no_grad():
        if position:
            z = odeint_adjoint(_Flow(chain), z, torch.tensor([0.0, position]).double(), **options)[-1]
    z = z.clone().requires_grad_()
    chain.loss(odeint_adjoint(_Flow(chain), z, torch.tensor([position, 1.0]).double(), **options)[-1]).backward()
    assert z.grad is not None
    return z.grad


def adjoint_distances(chain: SmoothChain, lengths: Sequence[int]) -> list[float]:
    """Largest relative distance of the discrete adjoint from the continuous one at `POSITIONS`, for each length."""
    limits = {position: continuous_sensitivity(chain, position) for position in POSITIONS}
    distances = []
    for length in lengths:
        steps = chain.steps(length)
        states = trajectory(steps, chain.start)
        last = states[-1].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(chain.loss(last), last)
        found = sensitivities(steps, states, gradient)
        distances.append(max(((found[round(p * length)] - s).norm() / s.norm()).item() for p, s in limits.items()))
    return distances
