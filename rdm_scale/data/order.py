"""The global order of samples: closed forms and keyed permutations, no files.

N samples are read by C canonical streams, C being the global batch size. Global position P is place i = P mod N of
epoch P div N and belongs to stream P mod C; step s (from 1) consumes positions (s - 1) C .. s C - 1, one from each
stream. Epochs follow each other without a gap, so a tail that does not fill a batch is carried over. Within an epoch:

1. The members of each shard are cut into runs of neighbours, large enough to be worth a request to an object store.
   The runs are put in a new order. Samples were shuffled over the whole set when they were encoded, so that neighbours
   have nothing in common.
2. The N samples in that order are cut into C parts of N div C or one more, and stream i mod C walks through one of
   them, the samples of each run, or of the piece of a run that is in its part, in a new order too.

So a batch takes its samples from C places of the data set, and a member is read by the one or two ranks whose streams
walk through it, whatever the number of ranks. All of it is a function of (seed, P): nothing has to be walked through
to begin at any step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from tarfile import BLOCKSIZE
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from numpy.random.bit_generator import ISeedSequence

from rdm_scale import rng
from rdm_scale.data.manifest import Manifest

Indices = npt.NDArray[np.int64]

RUN_BYTES = 2**22  # object stores are slow with less: what a request costs beside its bytes is then nothing
_LEAST_RUNS = 64  # of a set, if it has so many members: few could not be shuffled well


class Run(NamedTuple):
    """Neighbouring members of one shard, which are read together: indices of the set, its shard, and the members."""

    set: int
    shard: int
    first: int
    end: int


class Place(NamedTuple):
    """Where a sample lies: the indices of its shard, its member in the shard, and the sample in the member."""

    shard: int
    member: int
    sample: int


@dataclass(frozen=True, eq=False, slots=True)
class Piece:
    """What a stream takes from one run: numbers among the samples of the run, in the order in which they are read.

    Told apart by identity, which is quick: a batch of small samples has one for each of them.
    """

    run: Run
    samples: list[int]


class GlobalOrder:
    """Maps global positions to samples of one manifest, or of some of its shards.

    Args:
        streams: C, the global batch size.
        shards: indices of the shards that are read; None: all.
        run_bytes: how large a run is, about, in a set that is large enough.
        number: of the set, where there are several.

    Attributes:
        samples: N.
        largest_run: bytes of a run, at most.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        seed: int,
        streams: int,
        shards: Sequence[int] | None = None,
        run_bytes: int = RUN_BYTES,
        number: int = 0,
    ) -> None:
        self.seed, self.streams, self.number = seed, streams, number
        self._shards = np.array(range(len(manifest.shards)) if shards is None else shards, np.int64)
        chosen = [manifest.shards[index] for index in self._shards]
        self.samples = sum(shard.samples for shard in chosen)
        counts = [m.samples for shard in chosen for m in shard.members]
        self._before = np.cumsum([0, *counts])  # samples before each member, and after the last
        self._first_members = np.cumsum([0] + [len(shard.members) for shard in chosen])  # of each shard
        sizes = [m.bytes for shard in chosen for m in shard.members]
        together = max(1, min(round(run_bytes * len(sizes) / sum(sizes)), len(sizes) // _LEAST_RUNS))
        self.largest_run = together * (max(sizes) + 2 * BLOCKSIZE)  # bytes at most, with the tar's headers
        ranges = zip(self._first_members[:-1], self._first_members[1:], strict=True)
        self._runs = np.concatenate([np.arange(first, end, together) for first, end in ranges])  # their first members
        self._counts = np.diff(self._before[self._runs], append=self.samples)  # samples of each run
        length, longer = divmod(self.samples, streams)  # the first `longer` parts have one sample more
        self._parts = np.arange(streams + 1) * length + np.minimum(np.arange(streams + 1), longer)  # as `_before`
        # An epoch's tables are as long as the manifest; around the end of an epoch two of them are in use.
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._piece = lru_cache(maxsize=4 * streams)(self._make_piece)  # that a stream is at, in several steps planned

    def positions(self, step: int, dp_rank: int = 0, dp_size: int = 1) -> range:
        """The positions of a step (from 1) that a rank reads: those of its contiguous share of the streams."""
        share = self.streams // dp_size
        first = (step - 1) * self.streams + dp_rank * share
        return range(first, first + share)

    def places(self, positions: range) -> list[Place]:
        """Where the samples at these global positions lie."""
        return [self._place(piece.run, piece.samples[n]) for piece, n in zip(*self.pieces(positions), strict=True)]

    def pieces(self, positions: range) -> tuple[list[Piece], list[int]]:
        """Of each position the piece that holds its sample, and how many samples of the piece come before it.

        As long as a piece is in use it is one and the same object.
        """
        begins: list[int] = []
        nth: list[int] = []
        while len(nth) < len(positions):
            epoch, first = divmod(positions.start + len(nth), self.samples)
            count = min(len(positions) - len(nth), self.samples - first)
            for column, more in zip((begins, nth), self._walk(epoch, np.arange(first, first + count)), strict=True):
                column += more.tolist()
        return list(map(self._piece, begins)), nth

    def _walk(self, epoch: int, i: Indices) -> tuple[Indices, Indices]:
        """Where the pieces of what is read i-th begin in the walk through all epochs, and how far into them it is.

        Stream i mod C walks through the part of that number, of which it is the (i div C)-th sample.
        """
        nth, part = np.divmod(i, self.streams)
        begin = self._parts[part]
        index = begin + nth
        _, bounds = self._epoch(epoch)
        first = np.maximum(begin, bounds[bounds.searchsorted(index, side="right") - 1])
        return epoch * self.samples + first, index - first

    def _place(self, run: Run, sample: int) -> Place:
        base = self._first_members[np.searchsorted(self._shards, run.shard)]
        index = self._before[base + run.first] + sample
        member = np.searchsorted(self._before, index, side="right") - 1
        return Place(run.shard, int(member - base), int(index - self._before[member]))

    def _make_epoch(self, epoch: int) -> tuple[Indices, Indices]:
        """The runs in the order of an epoch, and where each begins in its order of samples, and the last ends."""
        runs = permutation(rng.key(self.seed, "order of runs", epoch), len(self._counts))
        return runs, np.cumsum(np.append(0, self._counts[runs]))

    def _make_piece(self, begin: int) -> Piece:
        """The piece that begins there in the walk through all epochs; it ends with its run or its stream's part."""
        epoch, first = divmod(begin, self.samples)
        runs, bounds = self._epoch(epoch)
        nth = int(bounds.searchsorted(first, side="right")) - 1
        run, skipped = int(runs[nth]), first - int(bounds[nth])
        size = min(int(bounds[nth + 1]), int(self._parts[self._parts.searchsorted(first, side="right")])) - first
        base = int(self._before[self._runs[run]]) + skipped
        member = int(self._before.searchsorted(base, side="right")) - 1
        end = int(self._before.searchsorted(base + size, side="left"))
        shard = int(self._first_members.searchsorted(member, side="right")) - 1
        offset = int(self._first_members[shard])
        members = Run(self.number, int(self._shards[shard]), member - offset, end - offset)
        order = permutation(rng.key(self.seed, "order of samples", epoch, run, skipped), size)
        return Piece(members, (order + (base - int(self._before[member]))).tolist())


def permutation(key: int, size: int) -> Indices:
    """A random permutation of 0 .. size - 1 that is a function of (key, size).

    Made of a bit generator and a stable sort, both of which NumPy keeps fixed; it does not promise that of
    `Generator.permutation`, nor torch of `randperm`.
    """
    return np.argsort(np.random.Philox(cast(Any, _Key(key))).random_raw(size), kind="stable")


class _Key(ISeedSequence):
    """Seeds a Philox as `Philox(key=...)` does; that first gathers entropy from the system, only to drop it."""

    def __init__(self, key: int) -> None:
        self._key = key

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> npt.NDArray[Any]:
        return np.array([self._key, 0], np.uint64)
