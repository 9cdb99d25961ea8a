"""Compute-optimal sizes: the N and D that minimize a law's loss for a budget of floating-point operations."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rdm_scale.scaling.law import Law
from rdm_scale.scaling.observations import Observations

Array = NDArray[np.float64]
LOG_SIZES = (0.0, math.log(1e14))  # in which the best size is looked for
TRANSFORMER_FLOPS = 6.0  # a parameter and token: the rule of thumb 6 N D, where nothing better is known


@dataclass(frozen=True)
class TrainingFlops:
    """Training FLOPs of one sample by model size, from runs: log-linear between known sizes and beyond their ends.

    Counted, not 6 N: attention and modulation make 6 N wrong by up to 45 % for diffusion transformers.

    Attributes:
        log_sizes: ln N of the known sizes, ascending; empty where the rule 6 N serves.
        log_flops: ln of the training FLOPs of one sample at these sizes.
    """

    log_sizes: tuple[float, ...] = ()
    log_flops: tuple[float, ...] = ()

    @classmethod
    def of(cls, observations: Observations) -> "TrainingFlops":
        """FLOPs by size as the runs have them; the rule 6 N if they do not say."""
        if observations.flops is None:
            return cls()
        per_sample = np.log(observations.flops / observations.samples)
        sizes = np.unique(observations.parameters)
        means = [float(per_sample[observations.parameters == size].mean()) for size in sizes]
        return cls(tuple(map(float, np.log(sizes))), tuple(means))

    def __call__(self, parameters: Array | float) -> Array:
        """Training FLOPs of one sample of models of these many parameters."""
        size = np.asarray(parameters, np.float64)
        if not self.log_sizes:
            return TRANSFORMER_FLOPS * size
        x, sizes, flops = np.log(size), np.array(self.log_sizes), np.array(self.log_flops)
        # Over all sizes: two close ones at an end would make an odd slope.
        slope = float(np.polyfit(sizes, flops, 1)[0]) if len(sizes) > 1 else 1.0
        beyond = slope * (np.minimum(x - sizes[0], 0) + np.maximum(x - sizes[-1], 0))
        return np.asarray(np.exp(np.interp(x, sizes, flops) + beyond))


@dataclass(frozen=True)
class Allocation:
    """Compute-optimal split of a budget."""

    flops: float
    parameters: float
    samples: float
    loss: float


def optimal_allocation(law: Law, budget: float, flops: TrainingFlops) -> Allocation:
    """N_opt(C), D_opt(C): the minimum of L(N, C / flops(N)) over N, on ever finer grids of ln N."""
    low, high = LOG_SIZES
    for _ in range(5):
        sizes = np.exp(np.linspace(low, high, 101))
        losses = law.loss(sizes, budget / flops(sizes))
        best = int(np.argmin(losses))
        low, high = np.log(sizes[max(best - 1, 0)]), np.log(sizes[min(best + 1, 100)])
    size = float(sizes[best])
    return Allocation(budget, size, float(budget / flops(size)), float(losses[best]))


def flops_power_law(observations: Observations, flops: Array, at: float) -> float:
    """Loss at a budget by a power law in FLOPs alone, ln L linear in ln C, for comparison."""
    slope, shift = np.polyfit(np.log(flops), np.log(observations.loss), 1)
    return float(np.exp(shift + slope * np.log(at)))
