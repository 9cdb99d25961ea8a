"""Plans of batches: each source in proportion to its weight, each bucket in proportion to its size, rank by rank."""

from collections import Counter

import pytest

from rdm_scale.config import DataSource
from rdm_scale.data.batch_plan import BatchPlan, BatchPlanner, check_data_parallel_rank
from rdm_scale.data.dataset import OpenDataset, open_dataset
from rdm_scale.errors import ConfigError
from tests.support.latent_sets import WriteSet, write_buckets


@pytest.fixture
def datasets(write_set: WriteSet) -> list[OpenDataset]:
    """Two sources of 24 and 48 samples, with weights 1 and 3."""
    urls = {write_set(24).url: 1.0, write_set(48, shape=(2, 1, 4, 4)).url: 3.0}
    return [open_dataset(DataSource(path=url, weight=weight)) for url, weight in urls.items()]


def planner(datasets: list[OpenDataset], rank: int = 0, dp: int = 1) -> BatchPlanner:
    return BatchPlanner(datasets, global_batch_size=8, seed=3, dp_rank=rank, dp_size=dp)


def samples_of(plan: BatchPlan) -> list[tuple[int, ...]]:
    """(source, shard, first member, sample) of each sample."""
    pairs = zip(plan.samples.segments, plan.samples.indices, strict=True)
    return [(*segment.read[:3], segment.samples[index]) for segment, index in pairs]


def test_sources_are_read_by_weight_and_each_sample_once_per_epoch(datasets: list[OpenDataset]) -> None:
    plans = [planner(datasets).plan(step) for step in range(1, 65)]
    assert [plan.step for plan in plans] == list(range(1, 65))
    assert Counter(plan.bucket.source for plan in plans) == {0: 16, 1: 48}
    assert {plan.bucket.shape for plan in plans} == {(2, 1, 3, 3), (2, 1, 4, 4)}
    for source, epochs in ((0, 16 * 8 // 24), (1, 48 * 8 // 48)):
        size = datasets[source].manifest.samples
        read = [sample for plan in plans if plan.bucket.source == source for sample in samples_of(plan)]
        for epoch in range(epochs):
            assert len(set(read[epoch * size : (epoch + 1) * size])) == size


def test_ranks_plan_contiguous_shares_of_the_global_batch(datasets: list[OpenDataset]) -> None:
    for step in (1, 5, 1_000_000):
        expected = planner(datasets).plan(step)
        shares = [planner(datasets, rank, dp=4).plan(step) for rank in range(4)]
        assert {share.bucket for share in shares} == {expected.bucket}
        assert [position for share in shares for position in share.positions] == list(expected.positions)
        assert [sample for share in shares for sample in samples_of(share)] == samples_of(expected)


def test_plans_never_change(write_set: WriteSet) -> None:
    """Literal samples of a fixed seed: runs that were started by earlier releases continue with the same batches."""
    bucketed = open_dataset(DataSource(path=write_buckets(write_set, (2, 1, 4, 4), (2, 1, 2, 8), (2, 1, 6, 3))))
    plans = [planner([bucketed]).plan(step) for step in range(21, 29)]
    assert [plan.bucket.shape[2:] for plan in plans] == [(4, 4), (2, 8), (2, 8), (6, 3), (4, 4), (6, 3), (4, 4), (2, 8)]
    assert samples_of(plans[0])[:4] == [(0, 0, 2, 0), (0, 0, 2, 2), (0, 0, 0, 0), (0, 0, 0, 3)]


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0)])
def test_ranks_outside_the_data_parallel_group_are_refused(rank: int, size: int) -> None:
    with pytest.raises(ConfigError, match=f"dp_rank={rank} is not a rank of dp_size={size}"):
        check_data_parallel_rank(rank, size)
