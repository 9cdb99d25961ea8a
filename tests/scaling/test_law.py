"""The fit finds the law that the losses follow, and the minimum of its objective where they scatter."""

import numpy as np
import pytest
from scipy.optimize import differential_evolution

from rdm_scale.errors import DataError
from rdm_scale.scaling.law import Law, fit_law, huber, law_objective
from rdm_scale.scaling.observations import Observations

CHINCHILLA = Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
LAWS = [CHINCHILLA, Law(E=1.0, A=3e3, B=30.0, alpha=0.5, beta=0.2), Law(E=0.2, A=5.0, B=40.0, alpha=0.15, beta=0.7)]


def isoflop_runs(law: Law, noise: float = 0.0, seed: int = 0) -> Observations:
    """Four budgets, nine sizes each, around the optimum of 6 N D = C."""
    ratio = (law.alpha * law.A / (law.beta * law.B)) ** (1 / (law.alpha + law.beta))
    sizes, samples = [], []
    for budget in np.geomspace(1e18, 1e21, 4):
        best = ratio * (budget / 6) ** (law.beta / (law.alpha + law.beta))
        for factor in np.geomspace(1 / 8, 8, 9):
            sizes.append(best * factor)
            samples.append(budget / 6 / (best * factor))
    n, d = np.array(sizes), np.array(samples)
    scatter = np.exp(noise * np.random.default_rng(seed).standard_normal(len(n)))
    return Observations(n, d, (law.E + law.A / n**law.alpha + law.B / d**law.beta) * scatter)


def test_huber_loss() -> None:
    assert huber(np.array([0.0, 5e-4, -1e-3, 0.1, -0.1])) == pytest.approx([0, 1.25e-7, 5e-7, 9.95e-5, 9.95e-5])


@pytest.mark.parametrize("law", LAWS, ids=["chinchilla", "asymmetric", "steep"])
def test_noise_free_losses_give_the_law_back(law: Law) -> None:
    fit = fit_law(isoflop_runs(law), searches=3)
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(fit.law, name) == pytest.approx(getattr(law, name), rel=1e-6), name
    assert fit.objective < 1e-18
    assert not fit.floor_at_bound


def test_no_point_nearby_is_better_than_the_fit() -> None:
    """The objective has kinks and a narrow valley, in which optimizers stop early. A global search finds no better."""
    runs = isoflop_runs(CHINCHILLA, noise=0.02)
    fit = fit_law(runs)
    assert fit.agreeing >= 6
    assert law_objective(fit.law, runs) == pytest.approx(fit.objective, rel=1e-9)
    center = np.array([fit.law.E, np.log(fit.law.A), np.log(fit.law.B), fit.law.alpha, fit.law.beta])

    def objective(x: np.ndarray) -> float:
        return law_objective(Law(float(x[0]), *np.exp(x[1:3]).tolist(), float(x[3]), float(x[4])), runs)

    width = np.array([0.2, 1.0, 1.0, 0.05, 0.05])
    bounds = list(zip(center - width, center + width, strict=True))
    found = differential_evolution(objective, bounds, seed=1, maxiter=60, popsize=8, polish=False)
    assert fit.objective <= found.fun * (1 + 1e-9)
    truth = law_objective(CHINCHILLA, runs)
    assert fit.objective < truth


def test_one_wild_run_moves_the_law_little() -> None:
    runs = isoflop_runs(CHINCHILLA, noise=1e-4)
    runs.loss[5] *= 1.5
    fit = fit_law(runs, searches=3)
    assert fit.law.alpha == pytest.approx(CHINCHILLA.alpha, rel=0.02)
    assert pytest.approx(CHINCHILLA.E, rel=0.01) == fit.law.E


def test_a_floor_that_the_runs_do_not_show_is_said() -> None:
    falling = Law(E=0.0, A=50.0, B=60.0, alpha=0.2, beta=0.2)
    assert fit_law(isoflop_runs(falling), searches=3).floor_at_bound


def test_too_few_sizes_are_refused() -> None:
    runs = isoflop_runs(CHINCHILLA)
    two = Observations(np.tile([1e6, 2e6], 5), np.repeat(np.geomspace(1e8, 1e9, 5), 2), np.linspace(3, 2, 10))
    with pytest.raises(DataError, match="2 model sizes"):
        fit_law(two)
    with pytest.raises(DataError, match="4 runs"):
        fit_law(runs.select(np.arange(4)))
