"""Compute-optimal sizes against their closed form, and FLOPs by size."""

import numpy as np
import pytest

from rdm_scale.scaling.allocation import TrainingFlops, flops_power_law, optimal_allocation
from rdm_scale.scaling.law import Law
from rdm_scale.scaling.observations import Observations

LAW = Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)


@pytest.mark.parametrize("budget", [1e18, 5.76e23])
def test_allocation_by_the_closed_form(budget: float) -> None:
    """N_opt = G (C / 6)^(beta / (alpha + beta)), D_opt = C / 6 N_opt (arXiv 2203.15556, equation 4)."""
    ratio = (LAW.alpha * LAW.A / (LAW.beta * LAW.B)) ** (1 / (LAW.alpha + LAW.beta))
    size = ratio * (budget / 6) ** (LAW.beta / (LAW.alpha + LAW.beta))
    found = optimal_allocation(LAW, budget, TrainingFlops())
    assert found.parameters == pytest.approx(size, rel=1e-4)
    assert found.samples == pytest.approx(budget / 6 / size, rel=1e-4)
    assert found.loss == pytest.approx(1.69 + 406.4 / size**0.34 + 410.7 / (budget / 6 / size) ** 0.28, rel=1e-8)


def test_flops_of_a_sample_between_and_beyond_the_runs() -> None:
    sizes = np.array([1e6, 1e6, 1e8])
    samples = np.array([1e3, 2e3, 1e3])
    runs = Observations(sizes, samples, np.ones(3), flops=np.array([1e10, 2e10, 1e13]))  # 1e7 and 1e10 a sample
    flops = TrainingFlops.of(runs)
    assert flops(np.array([1e6, 1e7, 1e8])) == pytest.approx([1e7, 10**8.5, 1e10])
    assert flops(np.array([1e4, 1e10])) == pytest.approx([1e4, 1e13])  # slope 1.5 in logarithms
    assert TrainingFlops()(5.0) == 30


def test_power_law_in_flops_alone() -> None:
    flops = np.array([1e10, 1e12, 1e14])
    runs = Observations(flops, flops, 2 * flops**-0.1)
    assert flops_power_law(runs, flops, 1e16) == pytest.approx(2 * 10**-1.6)
