"""Bootstrap intervals of a scaling law (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993)."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

from rdm_scale.scaling.law import Law, fit_law
from rdm_scale.scaling.observations import Observations

Array = NDArray[np.float64]
REPLICATES = 300
LEVEL = 0.9
# Most of these many resamples have at least 3 sizes and 3 lengths; the bound only ends a hopeless search.
ATTEMPTS = 1000


@dataclass(frozen=True)
class Interval:
    """Interval that holds a quantity in 90 % of repetitions."""

    low: float
    high: float


def bootstrap_laws(
    observations: Observations, law: Law, replicates: int = REPLICATES, seed: int = 0, workers: int = 1
) -> list[Law]:
    """Fit laws to resampled runs.

    Whole sizes are drawn with replacement, then the runs of each: what goes wrong with a size (its learning rate, its
    shape) is common to its runs, and what differs between seeds is not.

    Args:
        law: the fit to all runs, from which the fits begin.
        workers: processes that share the work.
    """
    fit = partial(_refit, observations, law)
    draws = list(_resamples(observations, replicates, np.random.default_rng(seed)))
    if workers <= 1:
        return [fit(rows) for rows in draws]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(fit, draws, chunksize=max(1, replicates // (8 * workers))))


def _refit(observations: Observations, law: Law, rows: NDArray[np.intp]) -> Law:
    return fit_law(observations.select(rows), [law], searches=2).law


def _resamples(
    observations: Observations, count: int, random: np.random.Generator
) -> Iterator[NDArray[np.intp]]:  # fmt: skip
    """Indices of resampled runs."""
    groups = [np.flatnonzero(observations.parameters == size) for size in np.unique(observations.parameters)]
    for _ in range(count):
        for _ in range(ATTEMPTS):
            drawn = [groups[group] for group in random.integers(len(groups), size=len(groups))]
            rows = np.concatenate([random.choice(group, len(group)) for group in drawn])
            sizes, lengths = (len(np.unique(v[rows])) for v in (observations.parameters, observations.samples))
            if sizes >= 3 and lengths >= 3:
                break
        yield rows


def interval(values: Array, level: float = LEVEL) -> Interval:
    """Interval between two percentiles of bootstrap values."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def intervals_of(laws: list[Law], quantities: dict[str, Callable[[Law], float]]) -> dict[str, Interval]:
    """Intervals of quantities that a law determines."""
    return {name: interval(np.array([quantity(law) for law in laws])) for name, quantity in quantities.items()}


def prediction_interval(
    laws: list[Law], law: Law, observations: Observations, parameters: float, samples: float, runs: int = 1
) -> Interval:
    """Interval of the mean loss of `runs` new runs of one size: uncertainty of the law, and the scatter of runs.

    The scatter is drawn from the residuals of ln L, of which a fit with 5 numbers has used up a part.
    """
    residuals = np.log(observations.loss) - np.log(law.loss(observations.parameters, observations.samples))
    residuals = (residuals - residuals.mean()) * np.sqrt(len(residuals) / max(1, len(residuals) - 5))
    random = np.random.default_rng(0)
    scatter = random.choice(residuals, (len(laws) * 20, runs)).mean(1)
    expected = np.repeat([float(one.loss(parameters, samples)) for one in laws], 20)
    return interval(expected * np.exp(scatter))
