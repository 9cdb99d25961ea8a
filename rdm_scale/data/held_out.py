"""Held-out samples for validation."""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from rdm_scale.batch import LatentBatch
from rdm_scale.config import DataConfig
from rdm_scale.data.assembly import assemble
from rdm_scale.data.batch_plan import Bucket, check_data_parallel_rank
from rdm_scale.data.buffer_pool import BufferPool
from rdm_scale.data.contiguous_reader import ContiguousReader, UnreadableError, open_cache
from rdm_scale.data.dataset import Sources, open_sources
from rdm_scale.data.loaded_samples import LoadedSample
from rdm_scale.data.manifest import Manifest
from rdm_scale.data.order import ContiguousRead
from rdm_scale.errors import ConfigError


class WeightedBatch(NamedTuple):
    """A batch of held-out samples, and the weight of each in the validation loss, float64 [B]."""

    batch: LatentBatch
    weights: Tensor


class _HeldOutSample(NamedTuple):
    """A read of one member, and the index of a sample in it."""

    read: ContiguousRead
    sample: int


class _Group(NamedTuple):
    """The held-out samples of one bucket."""

    bucket: Bucket
    samples: list[_HeldOutSample]


class HeldOut:
    """The first samples of a data set, in its order, for validation; each is read once over all ranks.

    Every shape of a data set, and every one of several weighted data sets, contributes in proportion. Iterating yields
    `WeightedBatch`es. Every rank gets the same number of batches of the same size, because collectives require it; the
    last batches are filled with repeated samples of weight 0. The position of a sample is its index among the
    held-out samples. Moments are sampled with noise keyed by the position alone, not by a run's seed, so that the
    losses of different runs can be compared.

    Args:
        samples: number of held-out samples, at most; the attribute `samples` is the actual number.
        batch_size: samples per batch and rank.
        captions: read the samples' captions, too; all data sets must have them.
        buffers: memory to read into, if shared with other streams.

    Raises:
        ConfigError: a number below 1, or dp_rank is not below dp_size.
        DataError: a manifest or a shard is missing or damaged; for shards also while iterating. There is no budget
            of lost shards, because validation losses can be compared only over the same samples.
    """

    def __init__(
        self,
        sources: Sources,
        samples: int,
        *,
        batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        config: DataConfig | None = None,
        captions: bool = False,
        buffers: BufferPool | None = None,
    ) -> None:
        check_data_parallel_rank(dp_rank, dp_size)
        if samples < 1 or batch_size < 1:
            raise ConfigError(f"{samples} held-out samples in batches of {batch_size}: use at least 1 of each")
        self.datasets, config = open_sources(sources, config)
        for reason in (reason for dataset in self.datasets for reason in dataset.damaged.values()):
            raise reason
        self.batch_size, self.dp_rank, self.dp_size = batch_size, dp_rank, dp_size
        self._groups = self._choose(samples)
        self.samples = sum(len(group.samples) for group in self._groups)
        self._buffers = buffers or BufferPool()
        shards = (shard for dataset in self.datasets for shard in dataset.manifest.shards)
        self._reader = ContiguousReader(
            self.datasets,
            in_use=1,
            largest=max(member.bytes for shard in shards for member in shard.members),
            workers=config.workers,
            cache=open_cache(config),
            captions=captions,
            buffers=self._buffers,
        )

    def __len__(self) -> int:
        """Number of batches of a rank."""
        return sum(self._batches(group) for group in self._groups)

    def __iter__(self) -> Iterator[WeightedBatch]:
        steps, first_position, stride = count(1), 0, self.batch_size * self.dp_size
        for group in self._groups:
            for number in range(self._batches(group)):
                start = number * stride + self.dp_rank * self.batch_size
                yield self._batch(next(steps), group, range(start, start + self.batch_size), first_position)
            first_position += len(group.samples)

    def close(self) -> None:
        """Stop the reading threads."""
        self._reader.close()

    def _batches(self, group: _Group) -> int:
        return -(-len(group.samples) // (self.batch_size * self.dp_size))

    def _batch(self, step: int, group: _Group, indices: range, first_position: int) -> WeightedBatch:
        """The samples of a group at `indices`; those beyond its end are its last sample again, with weight 0."""
        present = [min(index, len(group.samples) - 1) for index in indices]
        chosen = [group.samples[index] for index in present]
        try:
            loaded = self._reader.get([one.read for one in chosen])
        except UnreadableError as error:
            raise error.reason from None
        batch = assemble(
            [LoadedSample(samples, one.sample) for samples, one in zip(loaded, chosen, strict=True)],
            group.bucket.shape,
            self.datasets[group.bucket.source].manifest,
            step=step,
            positions=[first_position + index for index in present],
            seed=0,
            purpose="held-out posterior",
            buffers=self._buffers,
        )
        weights = [float(index < len(group.samples)) for index in indices]
        return WeightedBatch(batch, torch.tensor(weights, dtype=torch.float64))

    def _choose(self, samples: int) -> list[_Group]:
        """The held-out samples of each bucket, in proportion to weights and numbers of samples."""
        total = sum(dataset.weight for dataset in self.datasets)
        groups = []
        for number, dataset in enumerate(self.datasets):
            manifest = dataset.manifest
            of_dataset = min(max(1, round(samples * dataset.weight / total)), manifest.samples)
            for shape, shards in manifest.buckets.items():
                size = sum(manifest.shards[index].samples for index in shards)
                wanted = min(size, -(-of_dataset * size // manifest.samples))
                groups.append(_Group(Bucket(number, shape), _first_samples(number, manifest, shards, wanted)))
        return groups


def _first_samples(dataset: int, manifest: Manifest, shards: Sequence[int], wanted: int) -> list[_HeldOutSample]:
    """The first `wanted` samples of some shards."""
    found: list[_HeldOutSample] = []
    for s in shards:
        for m, member in enumerate(manifest.shards[s].members):
            read = ContiguousRead(dataset, s, m, m + 1)
            found += (_HeldOutSample(read, index) for index in range(min(member.samples, wanted - len(found))))
            if len(found) == wanted:
                return found
    return found
