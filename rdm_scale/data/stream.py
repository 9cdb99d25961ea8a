"""The endless stream of training batches.

The path of one batch: the plan of its step (`batch_plan`, from `mixing` and `order`), the contiguous reads that contain
its samples (`segment_loader`, `contiguous_reader`), and the batch assembled from the samples (`assembly`).
"""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count

from rdm_scale.batch import LatentBatch
from rdm_scale.config import DataConfig
from rdm_scale.data.assembly import assemble
from rdm_scale.data.batch_plan import BatchPlan, BatchPlanner, check_data_parallel_rank
from rdm_scale.data.buffer_pool import BufferPool
from rdm_scale.data.contiguous_reader import ContiguousReader, open_cache
from rdm_scale.data.dataset import Sources, open_sources
from rdm_scale.data.loaded_samples import LoadedSample
from rdm_scale.data.lost_shards import LostShards
from rdm_scale.data.order import ContiguousRead
from rdm_scale.data.segment_loader import SegmentLoader
from rdm_scale.errors import ConfigError
from rdm_scale.moved import moved_names

_AHEAD_STEPS = 64  # steps that are planned ahead, at most, to find reads to prefetch


class LatentStream:
    """Endless stream of the samples of one or more data sets in their global order.

    Iterating yields this rank's share of the batches of steps start_step + 1, + 2, ... The global batch of a step is
    the same for every dp_size and holds samples of one data set and one shape. Data sets are read in proportion to
    their weights, and the shapes of a data set in proportion to their numbers of samples, so that every sample of a
    data set is read once per epoch of it. Moments are sampled with noise keyed by (seed, position), where the position
    of a sample is its number in the run.

    Args:
        sources: URL or path of a manifest or its folder, on any fsspec file system; or several with weights.
        start_step: last step that is already done.
        config: how to read: workers, cache, options, budget of lost shards. `train` and `validation` are ignored.
        lost: shards known to be lost (`LostShards.known` of the resumed run).
        captions: read the samples' captions, too; all data sets must have them.
        buffers: memory to read into, if shared with other streams.

    Attributes:
        datasets: the data sets, opened.
        lost_shards: shards lost so far.

    Raises:
        ConfigError: dp_size does not divide global_batch_size, or dp_rank is not below dp_size.
        DataError: a manifest or a shard is missing or damaged; for shards also while iterating.
    """

    def __init__(
        self,
        sources: Sources,
        *,
        global_batch_size: int,
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        start_step: int = 0,
        config: DataConfig | None = None,
        lost: Sequence[Sequence[str]] = (),
        captions: bool = False,
        buffers: BufferPool | None = None,
    ) -> None:
        check_data_parallel_rank(dp_rank, dp_size)
        if global_batch_size < 1 or global_batch_size % dp_size:
            raise ConfigError(
                f"train.global_batch_size={global_batch_size} cannot be divided over {dp_size} data-parallel ranks: "
                f"use a multiple of {dp_size}"
            )
        self.seed, self.dp_rank, self.dp_size, self.start_step = seed, dp_rank, dp_size, start_step
        self.global_batch_size = global_batch_size
        self.datasets, config = open_sources(sources, config)
        self.lost_shards = LostShards([one.manifest for one in self.datasets], config.lost_shards, seed, lost)
        for number, dataset in enumerate(self.datasets):
            for shard, reason in dataset.damaged.items():
                self.lost_shards.mark_lost(number, shard, reason)
        self._planner = BatchPlanner(
            self.datasets, global_batch_size=global_batch_size, seed=seed, dp_rank=dp_rank, dp_size=dp_size
        )
        self._buffers = buffers or BufferPool()
        self._reader = ContiguousReader(
            self.datasets,
            in_use=global_batch_size // dp_size * self._planner.buckets,
            largest=self._planner.largest_read,
            workers=config.workers,
            cache=open_cache(config),
            captions=captions,
            buffers=self._buffers,
        )
        self._loader = SegmentLoader(self._reader, self.lost_shards)

    def __iter__(self) -> Iterator[LatentBatch]:
        """Yield batches in order; the reads of later steps are prefetched while a batch is used."""
        steps = count(self.start_step + 1)
        planned: deque[BatchPlan] = deque()
        while True:
            while not planned or (self._loader.has_room and len(planned) < _AHEAD_STEPS):
                plan = self.plan(next(steps))
                self._loader.prefetch(plan.bucket, plan.samples.segments)
                planned.append(plan)
            plan = planned.popleft()
            yield self.assemble(plan, self.load(plan))

    def batch(self, step: int) -> LatentBatch:
        """This rank's share of the batch of a step (from 1), independent of what was read before."""
        plan = self.plan(step)
        return self.assemble(plan, self.load(plan))

    def plan(self, step: int) -> BatchPlan:
        """The source, bucket and samples of this rank's share of the batch of a step (from 1)."""
        return self._planner.plan(step)

    def load(self, plan: BatchPlan) -> list[LoadedSample]:
        """Read the samples of a batch that are not in memory yet."""
        loaded = self._loader.load(plan.bucket, plan.samples.segments)
        return list(map(LoadedSample, loaded, plan.samples.indices))

    def assemble(self, plan: BatchPlan, samples: list[LoadedSample]) -> LatentBatch:
        """Assemble the batch from its samples."""
        return assemble(
            samples,
            plan.bucket.shape,
            self.datasets[plan.bucket.source].manifest,
            step=plan.step,
            positions=plan.positions,
            seed=self.seed,
            purpose="posterior",
            buffers=self._buffers,
        )

    @property
    def reads(self) -> list[ContiguousRead]:
        """Contiguous reads in memory or in progress."""
        return self._reader.reads

    def close(self) -> None:
        """Stop the reading threads."""
        self._reader.close()


__getattr__ = moved_names(__name__)
