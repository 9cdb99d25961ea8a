"""Scaling law of the loss in model size and data, and its fit.

The law is L(N, D) = E + A / N^alpha + B / D^beta, with N parameters and D samples seen (Hoffmann et al., "Training
Compute-Optimal Large Language Models", arXiv 2203.15556, approach 3). It is fitted by minimizing the sum of Huber
losses (delta 1e-3) of the residuals of ln L. Published fits were wrong because the optimizer had stopped early
(Besiroglu et al., arXiv 2404.10102), hence three measures: N and D are scaled to a geometric mean of one, the search
starts from variable projection (for given exponents the law is linear in E, A and B), and it is repeated from other
starts until several agree.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, minimize
from threadpoolctl import threadpool_limits

from rdm_scale.errors import DataError
from rdm_scale.scaling.observations import Observations

HUBER_DELTA = 1e-3
EXPONENTS = np.arange(0.05, 2.01, 0.1)  # grid of variable projection
MAX_EXPONENT = 10.0
AGREEMENT = 1e-6  # relative difference of the objective under which two searches have found the same minimum
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: Array | float, samples: Array | float) -> Array:
        """Loss of models of `parameters` parameters after `samples` samples."""
        size = self.A * np.asarray(parameters, np.float64) ** -self.alpha
        return np.asarray(self.E + size + self.B * np.asarray(samples, np.float64) ** -self.beta, np.float64)


@dataclass(frozen=True)
class Fit:
    """Best law for some observations.

    Attributes:
        objective: sum of the Huber losses of ln L at the minimum.
        agreeing: number of searches that ended at this objective, of `searches` in all.
        floor_at_bound: E ended at one of its bounds, 0 or the smallest loss: the data do not determine it.
    """

    law: Law
    objective: float
    agreeing: int
    searches: int
    floor_at_bound: bool


def huber(residuals: Array, delta: float = HUBER_DELTA) -> Array:
    """Huber loss: r^2 / 2 up to delta, delta (|r| - delta / 2) beyond."""
    size = np.abs(residuals)
    return np.where(size <= delta, 0.5 * residuals**2, delta * (size - 0.5 * delta))


def law_objective(law: Law, observations: Observations) -> float:
    """Sum of the Huber losses of ln L: what a fit minimizes."""
    predicted = law.loss(observations.parameters, observations.samples)
    return float(huber(np.log(predicted) - np.log(observations.loss)).sum())


def fit_law(observations: Observations, starts: Sequence[Law] = (), searches: int = 12, seed: int = 0) -> Fit:
    """Fit a law.

    Args:
        observations: of at least five runs with at least three sizes and three numbers of samples.
        starts: laws to begin from, beside that of variable projection.
        searches: number of searches; those beyond the given starts begin from varied exponents.
        seed: of the varied exponents.

    Raises:
        DataError: there are too few observations to determine five numbers.
    """
    _check(observations)
    problem = _Problem(observations)
    with threadpool_limits(1):  # the matrices are small: threads would only wait for each other
        points = [problem.projected(), *(problem.scaled(law) for law in starts)]
        random = np.random.default_rng(seed)
        while len(points) < searches:
            points.append(problem.with_exponents(random.uniform(0.05, 1.5, 2)))
        found = sorted((problem.search(point) for point in points[:searches]), key=lambda end: end[0])
        objective, point = problem.polished(*found[0])
    agreeing = sum(end[0] - objective <= AGREEMENT * max(objective, 1e-12) + 1e-15 for end in found)
    floor = point[0]
    at_bound = floor <= 1e-9 * problem.highest_floor or floor >= problem.highest_floor * (1 - 1e-6)
    return Fit(problem.law(point), objective, max(agreeing, 1), len(found), bool(at_bound))


def _check(observations: Observations) -> None:
    sizes, lengths = len(np.unique(observations.parameters)), len(np.unique(observations.samples))
    if len(observations) < 5 or sizes < 3 or lengths < 3:
        raise DataError(
            f"{len(observations)} runs of {sizes} model sizes and {lengths} numbers of samples cannot determine the "
            "five numbers of the law: add runs, so that there are at least 3 sizes and 3 numbers of samples"
        )


class _Problem:
    """The minimization in the variables (E, ln A', ln B', alpha, beta), A' and B' being those of scaled N and D."""

    def __init__(self, observations: Observations) -> None:
        self.log_n, self.log_d = np.log(observations.parameters), np.log(observations.samples)
        self.n_mean, self.d_mean = float(self.log_n.mean()), float(self.log_d.mean())
        self.log_n, self.log_d = self.log_n - self.n_mean, self.log_d - self.d_mean
        self.loss, self.log_loss = observations.loss, np.log(observations.loss)
        self.highest_floor = float(self.loss.min()) * (1 - 1e-9)
        self.bounds = [(0.0, self.highest_floor), (-60.0, 60.0), (-60.0, 60.0)] + [(1e-3, MAX_EXPONENT)] * 2

    def law(self, point: Array) -> Law:
        floor, log_a, log_b, alpha, beta = (float(value) for value in point)
        return Law(
            floor, float(np.exp(log_a + alpha * self.n_mean)), float(np.exp(log_b + beta * self.d_mean)), alpha, beta
        )

    def scaled(self, law: Law) -> Array:
        """Variables of a law."""
        log_a = np.log(law.A) - law.alpha * self.n_mean
        log_b = np.log(law.B) - law.beta * self.d_mean
        return np.array([min(law.E, self.highest_floor), log_a, log_b, law.alpha, law.beta])

    def projected(self) -> Array:
        """Start by variable projection: the exponents of a grid with the least squares in E, A and B."""
        best = min(
            (self._linear(alpha, beta)[0], alpha, beta) for alpha in EXPONENTS for beta in EXPONENTS
        )  # fmt: skip
        refined = minimize(
            lambda x: self._linear(x[0], x[1])[0], best[1:], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 0.0}
        )
        return self.with_exponents(refined.x)

    def with_exponents(self, exponents: Array) -> Array:
        """Point with given exponents and the best E, A and B for them, moved into the bounds."""
        alpha, beta = (float(np.clip(value, 0.01, MAX_EXPONENT - 1)) for value in exponents)
        floor, a, b = self._linear(alpha, beta)[1]
        least = 1e-6 * float(self.loss.mean())
        floor = float(np.clip(floor, 0.0, 0.999 * self.highest_floor))
        return np.array([floor, np.log(max(a, least)), np.log(max(b, least)), alpha, beta])

    def _linear(self, alpha: float, beta: float) -> tuple[float, Array]:
        """Sum of squares and (E, A', B') of the linear least squares for given exponents."""
        with np.errstate(over="ignore"):
            columns = np.stack([np.ones_like(self.log_n), np.exp(-alpha * self.log_n), np.exp(-beta * self.log_d)], 1)
        if not np.isfinite(columns).all():
            return np.inf, np.zeros(3)
        weighted = columns / self.loss[:, None]  # relative errors, as the logarithm weighs them
        scale = np.abs(weighted).max(0)
        solution = np.linalg.lstsq(weighted / scale, np.ones_like(self.loss), rcond=None)[0] / scale
        return float(((weighted @ solution - 1) ** 2).sum()), solution

    def residuals(self, point: Array) -> tuple[Array, Array]:
        """Residuals of ln L and their derivatives [rows, 5]."""
        floor, log_a, log_b, alpha, beta = point
        size, data = np.exp(log_a - alpha * self.log_n), np.exp(log_b - beta * self.log_d)
        predicted = floor + size + data
        slopes = np.stack([np.ones_like(size), size, data, -self.log_n * size, -self.log_d * data], 1)
        return np.log(predicted) - self.log_loss, slopes / predicted[:, None]

    def value_and_gradient(self, point: Array) -> tuple[float, Array]:
        residuals, slopes = self.residuals(point)
        return float(huber(residuals).sum()), np.clip(residuals, -HUBER_DELTA, HUBER_DELTA) @ slopes

    def search(self, start: Array) -> tuple[float, Array]:
        """Minimum from a start: L-BFGS, begun again where it ended for as long as that lowers the objective."""
        point, value = start, np.inf
        for _ in range(20):
            # The objective is small beside 1: scaled, so that the absolute tolerance on its gradient means something.
            unit = max(self.value_and_gradient(point)[0], 1e-30)
            end = minimize(
                lambda x, unit=unit: tuple(part / unit for part in self.value_and_gradient(x)),
                point,
                jac=True,
                method="L-BFGS-B",
                bounds=self.bounds,
                options={"maxiter": 2000, "maxfun": 4000, "ftol": 1e-14, "gtol": 1e-10, "maxcor": 20},
            )
            now = self.value_and_gradient(end.x)[0]
            if not now < value * (1 - 1e-9):
                break
            point, value = end.x, now
        return min(value, self.value_and_gradient(point)[0]), point

    def polished(self, value: float, point: Array) -> tuple[float, Array]:
        """Minimum after a last trust-region search with the same loss, if that is lower."""
        lower, upper = (np.array(bound) for bound in zip(*self.bounds, strict=True))
        end = least_squares(
            lambda x: self.residuals(x)[0],
            np.clip(point, lower + 1e-12, upper - 1e-12),
            jac=lambda x: self.residuals(x)[1],
            bounds=(lower, upper),
            loss="huber",
            f_scale=HUBER_DELTA,
            x_scale="jac",
            xtol=1e-15,
            ftol=1e-15,
            gtol=1e-15,
            max_nfev=500,
        )
        polished = self.value_and_gradient(end.x)[0]
        return (polished, end.x) if polished < value else (value, point)
