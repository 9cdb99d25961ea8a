"""Measures of generated samples as functions of their features: Frechet distance, IS, KID, precision and recall.

None of these functions knows where features come from. Shapes: N and M samples, D features, K classes.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from rdm_scale import rng
from rdm_scale.errors import DataError
from rdm_scale.evaluation.feature_moments import Gaussian

NEIGHBOURS = 3
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
_ROWS = 2048  # of a block of pairwise distances

Array = NDArray[np.floating]


class MeanAndSpread(NamedTuple):
    """Mean and standard deviation over splits or subsets."""

    mean: float
    std: float


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Squared Wasserstein-2 distance of two Gaussians (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

    |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 |S_1^(1/2) S_2^(1/2)|_*, with the nuclear norm in place of the trace of
    (S_1 S_2)^(1/2), which it equals. Square roots of a product that is singular lose half of the digits; singular
    values of a product of roots do not, with fewer samples than features either.

    Raises:
        DataError: the Gaussians have different numbers of features, or hold NaN or infinity.
    """
    if first.width != second.width:
        raise DataError(f"{first.width} features cannot be compared with {second.width}: use one network for both")
    for gaussian in (first, second):
        if not (np.isfinite(gaussian.mean).all() and np.isfinite(gaussian.covariance).all()):
            raise DataError("a mean or covariance holds NaN or infinity: compute these statistics again")
    difference = first.mean - second.mean
    roots = [_root(gaussian.covariance) for gaussian in (first, second)]
    overlap = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum() if min(map(np.size, roots)) else 0.0
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    return max(0.0, float(difference @ difference + traces - 2 * overlap))


def _root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Factor R [D, rank] of a covariance R R^T; directions without variance are left out."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > np.finfo(np.float64).eps * len(values) * max(0.0, values[-1])
    return vectors[:, kept] * np.sqrt(values[kept])


def expected_bias(covariance: NDArray[np.float64], *samples: int) -> float:
    """Expected Frechet distance between samples of one Gaussian, to first order in 1/N.

    (tr S + 1/2 sum_ij (1 + delta_ij) l_i l_j / (l_i + l_j)) (1/N + 1/M), with eigenvalues l of the covariance S: the
    error of the mean, and that of the covariance in the Bures metric. For S = I and an exact second Gaussian it is
    d/N + d(d+1)/4N. A distance of this size says nothing; both terms shrink only as 1/N.

    Args:
        samples: number of samples of each set; leave out a set whose statistics are exact.
    """
    values = np.linalg.eigvalsh(covariance).clip(min=0)
    values = values[values > 0]
    pairs = np.outer(values, values) / np.add.outer(values, values) if len(values) else np.zeros((0, 0))
    spread = float(values.sum() + (pairs.sum() + np.trace(pairs)) / 2)
    return spread * sum(1 / count for count in samples)


def inception_score(probabilities: Array, splits: int = 1, seed: int = 0) -> MeanAndSpread:
    """Inception score exp(E_x KL(p(y|x) || p(y))) (Salimans et al. 2016, arXiv 1606.03498), over `splits` parts.

    Samples are shuffled by key before they are split: splits of samples in the order of their classes would each hold
    few classes.

    Args:
        probabilities: [N, K] class probabilities.
        splits: parts of which the mean is taken; ADM and most papers use 10, which lowers the score of small sets.

    Raises:
        DataError: fewer samples than splits.
    """
    if splits < 1 or len(probabilities) < splits:
        raise DataError(
            f"an inception score of {splits} splits needs at least as many samples, not {len(probabilities)}"
        )
    p = torch.from_numpy(np.ascontiguousarray(probabilities, np.float64))
    if splits > 1:
        p = p[torch.randperm(len(p), generator=rng.generator(seed, "inception score splits"))]
    scores = []
    for part in p.tensor_split(splits):
        marginal = part.mean(0)
        divergence = part.xlogy(part).sum(1).mean() - marginal.xlogy(marginal).sum()
        scores.append(float(divergence.exp()))
    return MeanAndSpread(float(np.mean(scores)), float(np.std(scores)))


def kernel_distance(
    real: Array, generated: Array, subsets: int = KID_SUBSETS, subset_size: int = KID_SUBSET_SIZE, seed: int = 0
) -> MeanAndSpread:
    """Kernel inception distance (Binkowski et al. 2018, arXiv 1801.01401): unbiased, so it suits small sets.

    The unbiased estimate of the squared maximum mean discrepancy under the kernel (x . y / D + 1)^3, over random
    subsets; it can be negative.

    Args:
        real: [N, D] features.
        generated: [M, D] features.
        subset_size: samples of a subset; at most the size of the smaller set.

    Raises:
        DataError: fewer than 2 samples in a set.
    """
    size = min(subset_size, len(real), len(generated))
    if size < 2:
        raise DataError("a kernel distance needs at least 2 real and 2 generated samples")
    x, y = (torch.from_numpy(np.ascontiguousarray(features, np.float64)) for features in (real, generated))
    complete = size == len(x) == len(y)
    estimates = []
    for subset in range(1 if complete else subsets):
        draw = rng.generator(seed, "kernel distance subsets", subset)
        u, v = (z[torch.randperm(len(z), generator=draw)[:size]] for z in (x, y))
        uu, vv, uv = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((u, u), (v, v), (u, v)))
        within = (uu.sum() - uu.trace() + vv.sum() - vv.trace()) / (size * (size - 1))
        estimates.append(float(within - 2 * uv.mean()))
    return MeanAndSpread(float(np.mean(estimates)), float(np.std(estimates)))


def share_inside(points: Array, centers: Array, neighbours: int = NEIGHBOURS, *, half_precision: bool = False) -> float:
    """Share of points in the ball of at least one center (Kynkaanniemi et al. 2019, arXiv 1904.06991).

    The radius of a ball is the distance of its center to the k-th nearest other center. With real features as centers
    this is the precision of generated ones, and with generated features as centers the recall of real ones.

    Args:
        points: [N, D] features.
        centers: [M, D] features.
        neighbours: k.
        half_precision: compute distances in float16 as ADM's evaluator does, or in float32 where they overflow;
            otherwise in float64.

    Raises:
        DataError: no more than k centers.
    """
    if len(centers) <= neighbours:
        raise DataError(
            f"precision and recall with k = {neighbours} need more than {neighbours} samples of each set, not "
            f"{len(centers)}"
        )
    dtype = np.float32 if half_precision else np.float64
    x, y = (torch.from_numpy(np.ascontiguousarray(features, dtype)) for features in (points, centers))
    radii = _radii(y, neighbours, half_precision)
    inside = [(_squared_distances(rows, y, half_precision) <= radii).any(1) for rows in x.split(_ROWS)]
    return float(torch.cat(inside).double().mean())


def _radii(x: torch.Tensor, neighbours: int, half: bool) -> torch.Tensor:
    """Squared distance of each sample to its k-th nearest other sample."""
    # The nearest is the sample itself, also where rounding makes its distance more than 0.
    return torch.cat([_squared_distances(rows, x, half).kthvalue(neighbours + 1).values for rows in x.split(_ROWS)])


def _squared_distances(a: torch.Tensor, b: torch.Tensor, half: bool) -> torch.Tensor:
    def distances(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (u.square().sum(1, keepdim=True) - 2 * (u @ v.T) + v.square().sum(1)).clamp(min=0)

    if half:
        rounded = distances(a.half(), b.half()).float()
        if rounded.isfinite().all():
            return rounded
    return distances(a, b)
