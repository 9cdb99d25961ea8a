"""Batch plans: the source and bucket that each step reads, and the samples of this rank's share."""

from collections.abc import Sequence
from typing import NamedTuple

from rdm_scale import rng
from rdm_scale.data.dataset import OpenDataset
from rdm_scale.data.manifest import Shape
from rdm_scale.data.mixing import schedule_by_size, schedule_by_weight
from rdm_scale.data.order import READ_BYTES, GlobalOrder, SegmentIndices
from rdm_scale.errors import ConfigError

_IN_USE_BYTES = 2**31  # of all contiguous reads in use, over all ranks; the larger the batch, the smaller the reads


class Bucket(NamedTuple):
    """The samples of one shape of one source.

    Attributes:
        source: index of the data set.
        shape: [C, T, H, W] of the latents.
    """

    source: int
    shape: Shape


class BatchPlan(NamedTuple):
    """A rank's share of the batch of one step.

    Attributes:
        positions: positions of the samples in the run, which key their randomness.
        samples: the samples, as segments of the bucket's order and indices in them.
    """

    step: int
    positions: range
    bucket: Bucket
    samples: SegmentIndices


class BatchPlanner:
    """Planner of batches as a function of (seed, step); each batch has samples of one bucket of one source.

    Attributes:
        buckets: number of buckets of all sources.
        largest_read: upper bound of the bytes of a contiguous read.
    """

    def __init__(
        self, datasets: Sequence[OpenDataset], *, global_batch_size: int, seed: int, dp_rank: int, dp_size: int
    ) -> None:
        self._dp_rank, self._dp_size = dp_rank, dp_size
        manifests = [dataset.manifest for dataset in datasets]
        self.buckets = sum(len(manifest.buckets) for manifest in manifests)
        read_bytes = min(READ_BYTES, _IN_USE_BYTES // (global_batch_size * self.buckets))
        self._orders = {
            Bucket(s, shape): GlobalOrder(
                manifest,
                seed=rng.key(seed, "lane", s, b),
                global_batch_size=global_batch_size,
                shards=shards,
                read_bytes=read_bytes,
                dataset=s,
            )
            for s, manifest in enumerate(manifests)
            for b, (shape, shards) in enumerate(manifest.buckets.items())
        }
        self.largest_read = max(order.largest_read for order in self._orders.values())
        self._buckets = [[Bucket(s, shape) for shape in manifest.buckets] for s, manifest in enumerate(manifests)]
        self._source_of_step = schedule_by_weight([dataset.weight for dataset in datasets], seed)
        self._bucket_of_source = [
            schedule_by_size(
                [self._orders[bucket].samples for bucket in buckets], global_batch_size, rng.key(seed, "buckets", s)
            )
            for s, buckets in enumerate(self._buckets)
        ]

    def plan(self, step: int) -> BatchPlan:
        """Plan a step (from 1), in time that does not grow with the step."""
        source = self._source_of_step.assign(step - 1)
        slot = self._bucket_of_source[source.choice].assign(source.ordinal)
        bucket = self._buckets[source.choice][slot.choice]
        order = self._orders[bucket]
        positions = order.positions(step, self._dp_rank, self._dp_size)
        in_bucket = order.positions(slot.ordinal + 1, self._dp_rank, self._dp_size)
        return BatchPlan(step, positions, bucket, order.segments(in_bucket))


def check_data_parallel_rank(dp_rank: int, dp_size: int) -> None:
    """Raise ConfigError unless 0 <= dp_rank < dp_size."""
    if not 0 <= dp_rank < dp_size:
        raise ConfigError(f"dp_rank={dp_rank} is not a rank of dp_size={dp_size}: use 0 to dp_size - 1")
