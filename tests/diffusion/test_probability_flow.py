"""ODE and SDE samplers on a Gaussian mixture of known score: the marginals, and the orders of convergence."""

import math

import pytest
import torch

from rdm_scale.config import DiffusionConfig
from tests.support.mixture import (
    DDPM,
    FLOW,
    WEIGHTS,
    cdf,
    draw,
    path_error,
    posterior_means,
    quantile,
    wasserstein,
)


def order(errors: list[float]) -> float:
    """Order p of errors that decrease as steps^-p, from the first to the last number of steps."""
    return math.log2(errors[0] / errors[-1]) / (len(errors) - 1)


def test_the_mixture_is_correct() -> None:
    """E[x0 | x] against numerical integration over x0, and quantiles against the distribution function."""
    grid = torch.linspace(-5, 5, 100_001, dtype=torch.float64)
    density = torch.gradient(cdf(grid), spacing=(grid,))[0]
    scale, noise_level = torch.tensor(0.7).double(), torch.tensor(0.5).double()
    for x in (-1.0, 0.2, 1.3):
        likelihood = density * (-0.5 * ((x - scale * grid) / noise_level) ** 2).exp()
        expected = (likelihood * grid).sum() / likelihood.sum()
        x0, eps = posterior_means(torch.tensor(x, dtype=torch.float64), scale, noise_level)
        assert x0.item() == pytest.approx(expected.item(), abs=1e-4)
        assert (scale * x0 + noise_level * eps).item() == pytest.approx(x, abs=1e-12)
    levels = torch.tensor([1e-4, WEIGHTS[0], 0.5, 0.999]).double()
    assert torch.allclose(cdf(quantile(levels)), levels, atol=1e-9)


@pytest.mark.parametrize(
    ("diffusion", "sampler", "steps"),
    [(FLOW, "euler", 200), (FLOW, "heun", 60), (DDPM, "ddim", 250), (DDPM, "ddpm", 500)],
)
def test_all_samplers_reach_the_marginal(diffusion: DiffusionConfig, sampler: str, steps: int) -> None:
    """Kolmogorov-Smirnov distance; for exact samples it is below 0.0064 with probability 99 %."""
    x = draw(diffusion, sampler, steps).double().flatten().sort().values
    empirical = (torch.arange(len(x)) + 0.5) / len(x)
    assert (cdf(x) - empirical).abs().max() < 0.012


@pytest.mark.parametrize(
    ("diffusion", "sampler", "steps", "expected"),
    [
        (FLOW, "euler", (40, 80, 160), 1),
        (FLOW, "heun", (20, 40, 80), 2),
        (DDPM, "ddim", (25, 50, 100), 1),
    ],
)
def test_order_of_the_ode_samplers(
    diffusion: DiffusionConfig, sampler: str, steps: tuple[int, ...], expected: int
) -> None:
    found = order([path_error(diffusion, sampler, n) for n in steps])
    assert abs(found - expected) < 0.1, found


def test_order_of_the_sde_sampler() -> None:
    """Weak order 1: convergence of the marginal, not of paths."""
    errors = [wasserstein(draw(DDPM, "ddpm", n)) for n in (15, 30, 60)]
    assert 0.75 < order(errors) < 1.4, errors
