"""Sensitivities along depth: the discrete adjoint against autograd, and its limit against torchdiffeq's adjoint."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq import odeint_adjoint

from rdm_scale.config import ModelConfig
from rdm_scale.models import build_model
from rdm_scale.models.sensitivity import sensitivities, trajectory
from tests.support.smooth_chain import SmoothChain

PLACES = (0.0, 0.25, 0.5, 0.75)


@pytest.mark.parametrize("residual", ["plain", "rezero", "layerscale", "adaln_zero", "neural_rdm"])
def test_the_discrete_adjoint_is_what_autograd_computes(residual: str) -> None:
    """On whole blocks of a model whose gates and modulation have left their start."""
    config = ModelConfig.model_validate({"hidden_size": 32, "num_heads": 4, "depth": 6, "residual": residual})
    model = build_model(config, seed=1).double()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    size = config.input
    latents = torch.randn(2, size.channels, size.frames, size.height, size.width, generator=generator).double()
    with torch.no_grad():
        z, conditioning = model.embed(latents, torch.tensor([10.0, 700.0]), torch.tensor([0, 1]))
    units = [lambda z, block=block: block(z, conditioning) for block in model.blocks.values()]
    states = [z.requires_grad_()]
    for unit in units:
        states.append(unit(states[-1]))
        states[-1].retain_grad()
    goal = torch.randn(z.shape, generator=generator, dtype=torch.float64)
    (states[-1] * goal).sum().backward()
    found = sensitivities(units, trajectory(units, z), goal)
    assert len(found) == len(states) == 7
    for mine, state in zip(found, states, strict=True):
        assert (mine - state.grad).norm() <= 1e-6 * state.grad.norm()
    assert (found[0] - goal).norm() > 0.1 * goal.norm()


class Flow(nn.Module):
    """For torchdiffeq: the velocity of the chain's flow."""

    def __init__(self, chain: SmoothChain) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, s: Tensor, z: Tensor) -> Tensor:
        return self.chain.velocity(float(s.detach()), z)


def continuous(chain: SmoothChain, place: float) -> tuple[Tensor, Tensor]:
    """The stream at `place` of the flow, and dLoss/dz there, by torchdiffeq's adjoint equation."""
    options = {"rtol": 1e-10, "atol": 1e-12, "adjoint_params": ()}
    z = chain.start
    with torch.no_grad():
        if place:
            z = odeint_adjoint(Flow(chain), z, torch.tensor([0.0, place]).double(), **options)[-1]
    z = z.clone().requires_grad_()
    chain.loss(odeint_adjoint(Flow(chain), z, torch.tensor([place, 1.0]).double(), **options)[-1]).backward()
    return z.detach(), z.grad


def test_with_smooth_weights_it_converges_with_first_order_to_the_adjoint_equation() -> None:
    chain = SmoothChain()
    flow = {place: continuous(chain, place) for place in PLACES}
    errors = []
    for length in (32, 64, 128, 256):
        units = chain.units(length)
        states = trajectory(units, chain.start)
        last = states[-1].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(chain.loss(last), last)
        found = sensitivities(units, states, gradient)
        at = {place: round(place * length) for place in PLACES}
        errors.append(max(((found[at[p]] - s).norm() / s.norm()).item() for p, (_, s) in flow.items()))
    ratios = [before / after for before, after in itertools.pairwise(errors)]
    assert errors[-1] < 0.02
    assert all(1.8 < ratio < 2.2 for ratio in ratios), (errors, ratios)
