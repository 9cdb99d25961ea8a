"""Latents in batches: the endless stream of training, and the held-out set of validation."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rdm_scale import rng
from rdm_scale.codecs.codec import normalise_
from rdm_scale.conditions import TextCondition
from rdm_scale.config import DataConfig, DataSource
from rdm_scale.data import mixing
from rdm_scale.data.lost_shards import LostShards
from rdm_scale.data.manifest import Manifest, Shape
from rdm_scale.data.order import RUN_BYTES, GlobalOrder, Piece, Run
from rdm_scale.data.reader import (
    OpenSet,
    RunReader,
    Samples,
    UnreadableError,
    open_cache,
    open_set,
    stack_as_float,
)
from rdm_scale.data.shards import DTYPES
from rdm_scale.errors import ConfigError

_AHEAD_STEPS = 64  # at most so many steps are looked ahead for runs to read
_RUNS_BYTES = 2**31  # of the runs in use at a time, on all ranks together
Sources = str | Path | Sequence[DataSource]


@dataclass(frozen=True)
class LatentBatch:
    """The share of one rank of the samples of a step, all of one set and one shape, normalised to unit scale.

    positions, ids and labels int64 [B] (label -1: unlabelled); latents float32 [B, C, T, H, W].
    """

    step: int
    positions: Tensor
    ids: Tensor
    labels: Tensor
    latents: Tensor
    text: TextCondition | None = None


class _Planned(NamedTuple):
    step: int
    positions: range
    lane: tuple[int, int]  # set, and which of its shapes
    pieces: list[Piece]  # that the samples are in
    nth: list[int]  # sample of the piece


class LatentStream:
    """The samples of one or more sets in their global order, without end.

    Iterating yields this rank's batches of steps start_step + 1, + 2, ...; the global batch of a step is the same for
    every dp_size and holds one set and one shape. Sets take turns by their weights, the shapes of a set by their number
    of samples, so that every sample of a set is read once an epoch of that set. Moments are sampled with noise that
    belongs to (seed, position), the position of a sample being its number in the whole run.

    Args:
        sources: manifest, or folder that it is in, on any fsspec location; or several with weights.
        start_step: the last step that is done already.
        config: how to read: workers, cache, options, budget of lost shards. Its `train` and `validation` are not used.
        lost: shards that are known to be lost (`LostShards.known` of the run that is resumed).
        captions: read the samples' captions, too; all sets must have them.

    Raises:
        ConfigError: dp_size does not divide global_batch_size, or there is no such dp_rank.
        DataError: a manifest or a shard is missing or damaged; shards also while iterating.
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
    ) -> None:
        _check_ranks(dp_rank, dp_size)
        if global_batch_size < 1 or global_batch_size % dp_size:
            raise ConfigError(
                f"train.global_batch_size={global_batch_size} cannot be shared by {dp_size} data-parallel ranks: "
                f"use a multiple of {dp_size}"
            )
        self.sets, config = _open(sources, config)
        self.seed, self.dp_rank, self.dp_size, self.start_step = seed, dp_rank, dp_size, start_step
        self.global_batch_size = global_batch_size
        lanes = sum(len(one.manifest.buckets) for one in self.sets)
        run_bytes = min(RUN_BYTES, _RUNS_BYTES // (global_batch_size * lanes))
        self._lanes = [
            [
                GlobalOrder(
                    one.manifest,
                    seed=rng.key(seed, "lane", s, b),
                    streams=global_batch_size,
                    shards=of,
                    run_bytes=run_bytes,
                    number=s,
                )
                for b, of in enumerate(one.manifest.buckets.values())
            ]
            for s, one in enumerate(self.sets)
        ]
        self._turns = mixing.weighted([one.weight for one in self.sets], seed)
        self._turns_within = [
            mixing.by_size([order.samples for order in orders], global_batch_size, rng.key(seed, "buckets", s))
            for s, orders in enumerate(self._lanes)
        ]
        self.lost = LostShards([one.manifest for one in self.sets], config.lost_shards, seed, lost)
        for s, one in enumerate(self.sets):
            for shard, reason in one.damaged.items():
                self.lost.lose(s, shard, reason)
        streams = global_batch_size // dp_size * lanes  # of every lane a share is in use
        largest = max(order.largest_run for orders in self._lanes for order in orders)
        self._reader = RunReader(
            self.sets,
            streams=streams,
            largest=largest,
            workers=config.workers,
            cache=open_cache(config),
            captions=captions,
        )
        self._in_use: dict[tuple[int, int], dict[Piece, Samples]] = {}  # of each lane, by its step that was read last
        self._losses = len(self.lost)  # when these were read

    def __iter__(self) -> Iterator[LatentBatch]:
        """Reads ahead; what is read ahead of its use does not depend on what was asked for before."""
        steps = count(self.start_step + 1)
        planned: deque[_Planned] = deque()
        while True:
            while not planned or (self._reader.has_room and len(planned) < _AHEAD_STEPS):
                planned.append(self._plan(next(steps)))
                self._expect(planned[-1])
            yield self._read(planned.popleft())

    def batch(self, step: int) -> LatentBatch:
        """This rank's share of the batch of a step (from 1), whatever was read before."""
        return self._read(self._plan(step))

    def close(self) -> None:
        self._reader.close()

    def _plan(self, step: int) -> _Planned:
        which, turn = self._turns.of(step - 1)
        bucket, turn = self._turns_within[which].of(turn)
        order = self._lanes[which][bucket]
        positions = order.positions(step, self.dp_rank, self.dp_size)  # unique in the run, for its randomness
        pieces, nth = order.pieces(order.positions(turn + 1, self.dp_rank, self.dp_size))
        return _Planned(step, positions, (which, bucket), pieces, nth)

    def _expect(self, planned: _Planned) -> None:
        in_use = self._in_use.get(planned.lane, {})
        ahead = [piece for piece in planned.pieces if piece not in in_use]
        self._reader.expect(self.lost.stand_in(piece.run) for piece in ahead)

    def _read(self, planned: _Planned) -> LatentBatch:
        found = list(zip(self._found(planned), planned.nth, strict=True))
        which, bucket = planned.lane
        manifest = self.sets[which].manifest
        shape = tuple(manifest.buckets)[bucket]
        return _batch(planned.step, planned.positions, found, shape, manifest, self.seed, "posterior")

    def _found(self, planned: _Planned) -> list[Samples]:
        """Of each sample what was read of its piece."""
        while True:
            if len(self.lost) != self._losses:  # all ranks take what stands in from the same step on
                self._in_use.clear()
                self._losses = len(self.lost)
            try:
                found = self._in_use[planned.lane] = self._opened(planned)
                return [found[piece] for piece in planned.pieces]
            except UnreadableError as failed:
                self.lost.lose(failed.set, failed.shard, failed.reason)

    def _opened(self, planned: _Planned) -> dict[Piece, Samples]:
        """The pieces of a step: most of them were in use before, others are read."""
        before = self._in_use.get(planned.lane, {})
        added = list(dict.fromkeys(piece for piece in planned.pieces if piece not in before))
        if not added:
            return before
        now = set(planned.pieces)
        self._reader.release(self.lost.stand_in(piece.run) for piece in before if piece not in now)
        read = self._reader.get([self.lost.stand_in(piece.run) for piece in added])
        kept = {piece: samples for piece, samples in before.items() if piece in now}
        return kept | {piece: run.take(piece.samples) for piece, run in zip(added, read, strict=True)}


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
        _check_ranks(dp_rank, dp_size)
        if samples < 1 or batch_size < 1:
            raise ConfigError(f"a held-out set of {samples} samples in batches of {batch_size}: use at least 1")
        self.sets, config = _open(sources, config)
        for reason in (reason for one in self.sets for reason in one.damaged.values()):
            raise reason  # validation losses can be compared only when they are of the same samples
        self.batch_size, self.dp_rank, self.dp_size = batch_size, dp_rank, dp_size
        self._groups = self._choose(samples)
        self.samples = sum(len(places) for _, places in self._groups)
        largest = max(member.bytes for one in self.sets for shard in one.manifest.shards for member in shard.members)
        self._reader = RunReader(
            self.sets, streams=1, largest=largest, workers=config.workers, cache=open_cache(config), captions=captions
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
                positions, manifest = [first_position + index for index in present], self.sets[which].manifest
                found = list(zip(members, samples, strict=True))
                shape = manifest.shape_of(manifest.shards[runs[0].shard])
                batch = _batch(next(numbers), positions, found, shape, manifest, 0, "held-out posterior")
                yield batch, torch.tensor([float(index < len(places)) for index in indices], dtype=torch.float64)
            first_position += len(places)

    def close(self) -> None:
        self._reader.close()

    def _choose(self, samples: int) -> list[tuple[int, list[tuple[Run, int]]]]:
        """The places of each set and shape."""
        total = sum(one.weight for one in self.sets)
        groups = []
        for s, one in enumerate(self.sets):
            manifest = one.manifest
            of_set = min(max(1, round(samples * one.weight / total)), manifest.samples)
            for shards in manifest.buckets.values():
                size = sum(manifest.shards[index].samples for index in shards)
                wanted = min(size, -(-of_set * size // manifest.samples))
                groups.append((s, _first_places(s, manifest, shards, wanted)))
        return groups


def _open(sources: Sources, config: DataConfig | None) -> tuple[list[OpenSet], DataConfig]:
    if isinstance(sources, str | Path):
        sources = [DataSource(path=str(sources))]
    config = config or DataConfig(train=tuple(sources))
    return [open_set(source, config.options) for source in sources], config


def _batch(
    step: int,
    positions: Sequence[int],
    found: Sequence[tuple[Samples, int]],
    shape: Shape,
    manifest: Manifest,
    seed: int,
    purpose: str,
) -> LatentBatch:
    """
    Args:
        found: of each sample what was read, and its index there.
    """
    if manifest.kind == "moments":
        noise = [torch.randn(shape, generator=rng.generator(seed, purpose, position)) for position in positions]
        moments = stack_as_float(found, manifest.stored_shape(shape), DTYPES[manifest.dtype])
        latents = normalise_(posterior_sample(moments, torch.stack(noise)), manifest.codec)
    else:
        latents = stack_as_float(found, shape, DTYPES[manifest.dtype], manifest.codec)
    return LatentBatch(
        step=step,
        positions=_integers(positions),
        ids=_integers([samples.ids[index] for samples, index in found]),
        labels=_integers([samples.labels[index] for samples, index in found]),
        latents=latents,
        text=TextCondition.of([run.captions[i] for run, i in found]) if found[0][0].captions else None,
    )


def _integers(values: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.array(values, np.int64))  # torch.tensor takes three times as long


def posterior_sample(moments: Tensor, noise: Tensor) -> Tensor:
    """A draw from the posterior: moments [B, 2C, T, H, W] and noise [B, C, T, H, W] to raw latents [B, C, T, H, W].

    The log-variance is clamped as in latent diffusion (Rombach et al. 2022) and diffusers.
    """
    mean, log_variance = moments.chunk(2, dim=1)
    return mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise


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


def _check_ranks(dp_rank: int, dp_size: int) -> None:
    if not 0 <= dp_rank < dp_size:
        raise ConfigError(f"there is no data-parallel rank {dp_rank} of {dp_size}")
