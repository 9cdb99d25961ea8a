"""Latents in batches: the endless stream of training, and the held-out set of validation."""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

from rdm_scale import rng
from rdm_scale.batch import LatentBatch
from rdm_scale.config import DataConfig
from rdm_scale.data import mixing
from rdm_scale.data.assembly import Sources, assemble, check_ranks, open_datasets
from rdm_scale.data.lost_shards import LostShards
from rdm_scale.data.order import RUN_BYTES, GlobalOrder, Piece
from rdm_scale.data.reader import (
    RunReader,
    Samples,
    UnreadableError,
    open_cache,
)
from rdm_scale.errors import ConfigError
from rdm_scale.moved import moved_names

_AHEAD_STEPS = 64  # at most so many steps are looked ahead for runs to read
_RUNS_BYTES = 2**31  # of the runs in use at a time, on all ranks together


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
        check_ranks(dp_rank, dp_size)
        if global_batch_size < 1 or global_batch_size % dp_size:
            raise ConfigError(
                f"train.global_batch_size={global_batch_size} cannot be shared by {dp_size} data-parallel ranks: "
                f"use a multiple of {dp_size}"
            )
        self.datasets, config = open_datasets(sources, config)
        self.seed, self.dp_rank, self.dp_size, self.start_step = seed, dp_rank, dp_size, start_step
        self.global_batch_size = global_batch_size
        lanes = sum(len(one.manifest.buckets) for one in self.datasets)
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
            for s, one in enumerate(self.datasets)
        ]
        self._turns = mixing.weighted([one.weight for one in self.datasets], seed)
        self._turns_within = [
            mixing.by_size([order.samples for order in orders], global_batch_size, rng.key(seed, "buckets", s))
            for s, orders in enumerate(self._lanes)
        ]
        self.lost_shards = LostShards([one.manifest for one in self.datasets], config.lost_shards, seed, lost)
        for s, one in enumerate(self.datasets):
            for shard, reason in one.damaged.items():
                self.lost_shards.mark_lost(s, shard, reason)
        streams = global_batch_size // dp_size * lanes  # of every lane a share is in use
        largest = max(order.largest_run for orders in self._lanes for order in orders)
        self._reader = RunReader(
            self.datasets,
            streams=streams,
            largest=largest,
            workers=config.workers,
            cache=open_cache(config),
            captions=captions,
        )
        self._in_use: dict[tuple[int, int], dict[Piece, Samples]] = {}  # of each lane, by its step that was read last
        self._losses = len(self.lost_shards)  # when these were read

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
        self._reader.expect(self.lost_shards.substitute(piece.run) for piece in ahead)

    def _read(self, planned: _Planned) -> LatentBatch:
        found = list(zip(self._found(planned), planned.nth, strict=True))
        which, bucket = planned.lane
        manifest = self.datasets[which].manifest
        shape = tuple(manifest.buckets)[bucket]
        return assemble(planned.step, planned.positions, found, shape, manifest, self.seed, "posterior")

    def _found(self, planned: _Planned) -> list[Samples]:
        """Of each sample what was read of its piece."""
        while True:
            if len(self.lost_shards) != self._losses:  # all ranks take what stands in from the same step on
                self._in_use.clear()
                self._losses = len(self.lost_shards)
            try:
                found = self._in_use[planned.lane] = self._opened(planned)
                return [found[piece] for piece in planned.pieces]
            except UnreadableError as failed:
                self.lost_shards.mark_lost(failed.set, failed.shard, failed.reason)

    def _opened(self, planned: _Planned) -> dict[Piece, Samples]:
        """The pieces of a step: most of them were in use before, others are read."""
        before = self._in_use.get(planned.lane, {})
        added = list(dict.fromkeys(piece for piece in planned.pieces if piece not in before))
        if not added:
            return before
        now = set(planned.pieces)
        self._reader.release(self.lost_shards.substitute(piece.run) for piece in before if piece not in now)
        read = self._reader.get([self.lost_shards.substitute(piece.run) for piece in added])
        kept = {piece: samples for piece, samples in before.items() if piece in now}
        return kept | {piece: run.take(piece.samples) for piece, run in zip(added, read, strict=True)}


__getattr__ = moved_names(__name__)
