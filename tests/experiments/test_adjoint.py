"""Sensitivities along depth: the discrete adjoint against autograd, and its limit against torchdiffeq's adjoint."""

import itertools

import pytest
import torch

from experiments.adjoint import adjoint_distances, sensitivities, trajectory
from rdm_scale.config import ModelConfig
from rdm_scale.models import build_model
from tests.support.smooth_chain import SmoothChain


@pytest.mark.parametrize("residual", ["plain", "rezero", "layerscale", "adaln_zero", "neural_rdm"])
def test_discrete_adjoint_equals_autograd(residual: str) -> None:
    """Blocks of a model all of whose parameters have been moved from their initial values."""
    config = ModelConfig.model_validate({"hidden_size": 32, "num_heads": 4, "depth": 6, "residual": residual})
    model = build_model(config, seed=1).double()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    size = config.input
    latents = torch.randn(2, size.channels, size.frames, size.height, size.width, generator=generator).double()
    with torch.no_grad():
        z, conditioning = model.embed(latents, torch.tensor([10.0, 700.0]), torch.tensor([0, 1]))
    steps = [lambda z, block=block: block(z, conditioning) for block in model.blocks.values()]
    states = [z.requires_grad_()]
    for step in steps:
        states.append(step(states[-1]))
        states[-1].retain_grad()
    goal = torch.randn(z.shape, generator=generator, dtype=torch.float64)
    (states[-1] * goal).sum().backward()
    found = sensitivities(steps, trajectory(steps, z), goal)
    assert len(found) == len(states) == 7
    for sensitivity, state in zip(found, states, strict=True):
        assert (sensitivity - state.grad).norm() <= 1e-6 * state.grad.norm()
    assert (found[0] - goal).norm() > 0.1 * goal.norm()


def test_with_smooth_weights_the_adjoints_converge_with_first_order() -> None:
    errors = adjoint_distances(SmoothChain(), (32, 64, 128, 256))
    ratios = [before / after for before, after in itertools.pairwise(errors)]
    assert errors[-1] < 0.02
    assert all(1.8 < ratio < 2.2 for ratio in ratios), (errors, ratios)
