"""Moments of features: accuracy at large means, merging over batches and ranks."""

from typing import Any

import numpy as np
import pytest
import torch

from rdm_scale.config import ParallelConfig
from rdm_scale.errors import DataError
from rdm_scale.evaluation.feature_moments import FeatureMoments
from tests.support.rank_pool import RankPool


def features(samples: int = 101, width: int = 5) -> torch.Tensor:
    return torch.randn(samples, width, generator=torch.Generator().manual_seed(0)) * 0.01 + 1000


def moments_of(x: torch.Tensor, batch: int) -> FeatureMoments:
    moments = FeatureMoments(x.shape[1])
    for part in x.split(batch):
        moments.add(part)
    return moments


@pytest.mark.parametrize("batch", [1, 7, 101])
def test_large_means_keep_the_covariance(batch: int) -> None:
    """Raw sums of squares in float32 would lose all digits of a deviation of 0.01 at a mean of 1,000."""
    x = features()
    found = moments_of(x, batch).gaussian()
    np.testing.assert_allclose(found.mean, x.double().mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-13)


def test_accumulators_merge() -> None:
    x = features()
    parts = [moments_of(part, 10) for part in (x[:30], x[30:31], x[31:])]
    parts[0].merge(FeatureMoments(5))
    for part in parts[1:]:
        parts[0].merge(part)
    assert parts[0].count == 101
    found, expected = (moments.gaussian().covariance for moments in (parts[0], moments_of(x, 101)))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-13)


def reduced(samples: int) -> tuple[int, Any]:
    """Run on each rank: moments of this rank's part of the features, merged over ranks; the last may have none."""
    from rdm_scale.parallel.mesh import build_mesh

    mesh = build_mesh(ParallelConfig())
    share = -(-samples // mesh.data_size)
    moments = moments_of(features(samples)[share * mesh.data_rank :][:share], 4)
    moments.all_reduce(mesh.all_reduce_sum_on_cpu)
    gaussian = moments.gaussian()
    mesh.shutdown()
    return moments.count, gaussian


@pytest.mark.parametrize(("world", "samples"), [(2, 101), (4, 9)])
def test_ranks_agree_with_one_process(ranks: RankPool, world: int, samples: int) -> None:
    expected = moments_of(features(samples), samples).gaussian()
    for count, found in ranks.run(world, reduced, samples):
        assert count == samples
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12)
        np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-9, atol=1e-13)


def test_features_that_are_not_finite_and_no_features_are_refused() -> None:
    x = features()
    x[3, 2] = torch.nan
    with pytest.raises(DataError, match="1 of 101 feature vectors hold NaN or infinity"):
        moments_of(x, 101)
    with pytest.raises(DataError, match="there are no samples"):
        FeatureMoments(3).gaussian()


def test_one_sample_has_no_variance() -> None:
    found = moments_of(features(1), 1).gaussian()
    assert not found.covariance.any() and found.mean[0] == pytest.approx(1000, abs=0.1)
