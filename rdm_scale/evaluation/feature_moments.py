"""Mean and covariance of feature vectors, accumulated in float64 and mergeable over batches and ranks.

Shapes: B vectors of a batch, N vectors in all, D numbers in a vector.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rdm_scale.errors import DataError


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] of a set of feature vectors, in float64."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @property
    def width(self) -> int:
        """Number D of features."""
        return len(self.mean)


class FeatureMoments:
    """Count, mean and centered second moments of feature vectors.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1979): sums of raw squares would lose the
    covariance of features whose mean is large.

    Args:
        width: number D of features.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.scatter = torch.zeros(width, width, dtype=torch.float64)  # sum of (x - mean) (x - mean)^T

    def add(self, features_BD: Tensor) -> None:
        """Add the feature vectors of a batch, of any floating-point dtype.

        Raises:
            DataError: a feature is NaN or infinite.
        """
        if not len(features_BD):
            return
        x = features_BD.detach().to("cpu", torch.float64)
        if not x.isfinite().all():
            raise DataError(
                f"{int((~x.isfinite()).any(1).sum())} of {len(x)} feature vectors hold NaN or infinity: look at these "
                "samples; a model whose weights have diverged draws such pixels"
            )
        mean = x.mean(0)
        centered = x - mean
        self._merge(len(x), mean, centered.T @ centered)

    def merge(self, other: "FeatureMoments") -> None:
        """Add the vectors that another accumulator has seen."""
        self._merge(other.count, other.mean, other.scatter)

    def all_reduce(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Merge the accumulators of all ranks, on every rank. Collective.

        Args:
            sum_over_ranks: element-wise sum of float64 tensors, for instance `Mesh.all_reduce_sum_on_cpu`.
        """
        count, mean = float(self.count), self.mean
        sums = sum_over_ranks(torch.cat([torch.tensor([count], dtype=torch.float64), count * mean]))
        total = sums[1:] / max(1.0, float(sums[0]))
        shift = mean - total
        scatter = sum_over_ranks(self.scatter + count * torch.outer(shift, shift))
        self.count, self.mean, self.scatter = round(float(sums[0])), total, scatter

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance (division by N - 1); the covariance of one vector is 0.

        Raises:
            DataError: there are no vectors.
        """
        if not self.count:
            raise DataError("there are no samples: a mean and a covariance need some")
        return Gaussian(self.mean.numpy().copy(), (self.scatter / max(1, self.count - 1)).numpy())

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if not count:
            return
        total = self.count + count
        shift = mean - self.mean
        self.scatter += scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total
