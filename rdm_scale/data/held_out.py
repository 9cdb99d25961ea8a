"""The held-out set of validation."""

from collections.abc import Iterator, Sequence
from itertools import count

import torch
from torch import Tensor

from rdm_scale.batch import LatentBatch
from rdm_scale.config import DataConfig
from rdm_scale.data.assembly import Sources, assemble, check_ranks, open_datasets
from rdm_scale.data.manifest import Manifest
from rdm_scale.data.order import Run
from rdm_scale.data.reader import (
    RunReader,
    UnreadableError,
    open_cache,
)
from rdm_scale.errors import ConfigError


class HeldOut:
    """The first samples of a set, in its order, for validation: each once over all ranks.

    Of a set with several shapes, and of several sets by their weights, it is the first samples of each in proportion.
    Iterating yields (batch, weights [B] float64). Every rank gets the same number of batches of the same size, as
    collectives need; what is lacking to fill them is a last sample again, with weight 0. A sample's position is its
    index here. Moments are sampled with noise that belongs to the position alone, not to a run's seed, so that runs can
    be compared.

    Args:
        samples: size of the held-out set, at most; attribute `samples` is how many there are.
        batch_size: samples in a batch of one rank.
        captions: read the samples' captions, too; all sets must have them.

    Raises:
        ConfigError: an impossible size or rank.
        DataError: as `LatentStream`.
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
    ) -> None:
        check_ranks(dp_rank, dp_size)
        if samples < 1 or batch_size < 1:
            raise ConfigError(f"a held-out set of {samples} samples in batches of {batch_size}: use at least 1")
        self.datasets, config = open_datasets(sources, config)
        for reason in (reason for one in self.datasets for reason in one.damaged.values()):
            raise reason  # validation losses can be compared only when they are of the same samples
        self.batch_size, self.dp_rank, self.dp_size = batch_size, dp_rank, dp_size
        self._groups = self._choose(samples)
        self.samples = sum(len(places) for _, places in self._groups)
        largest = max(
            member.bytes for one in self.datasets for shard in one.manifest.shards for member in shard.members
        )
        self._reader = RunReader(
            self.datasets,
            streams=1,
            largest=largest,
            workers=config.workers,
            cache=open_cache(config),
            captions=captions,
        )

    def __len__(self) -> int:
        return sum(-(-len(places) // (self.batch_size * self.dp_size)) for _, places in self._groups)

    def __iter__(self) -> Iterator[tuple[LatentBatch, Tensor]]:
        numbers, first_position = count(1), 0
        for which, places in self._groups:
            for start in range(self.dp_rank * self.batch_size, _whole(places, self), self.batch_size * self.dp_size):
                indices = range(start, start + self.batch_size)
                present = [min(index, len(places) - 1) for index in indices]
                runs = [places[index][0] for index in present]
                samples = [places[index][1] for index in present]
                try:
                    members = self._reader.get(runs)
                except UnreadableError as failed:
                    raise failed.reason from None
                positions, manifest = [first_position + index for index in present], self.datasets[which].manifest
                found = list(zip(members, samples, strict=True))
                shape = manifest.shape_of(manifest.shards[runs[0].shard])
                batch = assemble(next(numbers), positions, found, shape, manifest, 0, "held-out posterior")
                yield batch, torch.tensor([float(index < len(places)) for index in indices], dtype=torch.float64)
            first_position += len(places)

    def close(self) -> None:
        self._reader.close()

    def _choose(self, samples: int) -> list[tuple[int, list[tuple[Run, int]]]]:
        """The places of each set and shape."""
        total = sum(one.weight for one in self.datasets)
        groups = []
        for s, one in enumerate(self.datasets):
            manifest = one.manifest
            of_set = min(max(1, round(samples * one.weight / total)), manifest.samples)
            for shards in manifest.buckets.values():
                size = sum(manifest.shards[index].samples for index in shards)
                wanted = min(size, -(-of_set * size // manifest.samples))
                groups.append((s, _first_places(s, manifest, shards, wanted)))
        return groups


def _whole(places: Sequence[tuple[Run, int]], held_out: HeldOut) -> int:
    """So many samples that all ranks have the same number of full batches."""
    step = held_out.batch_size * held_out.dp_size
    return -(-len(places) // step) * step


def _first_places(number: int, manifest: Manifest, shards: Sequence[int], wanted: int) -> list[tuple[Run, int]]:
    """Each sample by a run of one member and its index in it."""
    places: list[tuple[Run, int]] = []
    for s in shards:
        for m, member in enumerate(manifest.shards[s].members):
            run = Run(number, s, m, m + 1)
            places += ((run, sample) for sample in range(min(member.samples, wanted - len(places))))
            if len(places) == wanted:
                return places
    return places
