"""The global order of samples: closed forms and keyed permutations, no files.

N samples are read by C canonical streams, C being the global batch size. Global position P is place i = P mod N of
epoch P div N and belongs to stream P mod C; step s (from 1) consumes positions (s - 1) C .. s C - 1, one from each
stream. Epochs follow each other without a gap, so a tail that does not fill a batch is carried over. Within an epoch:

1. The members are put in a new order, and the samples within each member as well.
2. The N samples in that order are cut into C runs of N div C or one more, and stream i mod C walks through one of them.

So a batch takes its samples from C places of the data set, and a member is read by the one or two ranks whose streams
walk through it, whatever the number of ranks. All of it is a function of (seed, P): nothing has to be walked through
to begin at any step.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from numpy.random.bit_generator import ISeedSequence

from rdm_scale import rng
from rdm_scale.data.manifest import Manifest

Indices = npt.NDArray[np.int64]


class Place(NamedTuple):
    """Where a sample lies: the indices of its shard, its member in the shard, and the sample in the member."""

    shard: int
    member: int
    sample: int


class GlobalOrder:
    """Maps global positions to samples of one manifest, or of some of its shards.

    Args:
        streams: C, the global batch size.
        shards: indices of the shards that are read; None: all.
    """

    def __init__(self, manifest: Manifest, *, seed: int, streams: int, shards: Sequence[int] | None = None) -> None:
        self.seed, self.streams = seed, streams
        self._shards = np.array(range(len(manifest.shards)) if shards is None else shards, np.int64)
        chosen = [manifest.shards[index] for index in self._shards]
        self.samples = sum(shard.samples for shard in chosen)
        self._counts = np.array([m.samples for shard in chosen for m in shard.members], np.int64)
        self._first_members = np.cumsum([0] + [len(shard.members) for shard in chosen])  # of each shard
        # An epoch's tables are as long as the manifest; around the end of an epoch two of them are in use.
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._within = lru_cache(maxsize=4 * streams)(self._make_within)

    def positions(self, step: int, dp_rank: int = 0, dp_size: int = 1) -> range:
        """The positions of a step (from 1) that a rank reads: those of its contiguous share of the streams."""
        share = self.streams // dp_size
        first = (step - 1) * self.streams + dp_rank * share
        return range(first, first + share)

    def places(self, positions: range) -> list[Place]:
        """Where the samples at these global positions lie."""
        return list(map(Place, *self.columns(positions)))

    def columns(self, positions: range) -> tuple[list[int], list[int], list[int]]:
        """`places` by column: shards, members, samples. Much less work than an object for each sample."""
        epochs, places = np.divmod(np.arange(positions.start, positions.stop), self.samples)
        parts = [self._columns(int(epoch), places[epochs == epoch]) for epoch in range(epochs[0], epochs[-1] + 1)]
        shards, members, samples = (list(chain.from_iterable(column)) for column in zip(*parts, strict=True))
        return shards, members, samples

    def _columns(self, epoch: int, i: Indices) -> tuple[list[int], list[int], list[int]]:
        order, ends = self._epoch(epoch)
        index = self._index(i)
        slots = np.searchsorted(ends, index, side="right")
        members = order[slots]
        nth = index - (ends[slots] - self._counts[members])
        samples = [self._within(epoch, m)[n] for m, n in zip(members.tolist(), nth.tolist(), strict=True)]
        shards = np.searchsorted(self._first_members, members, side="right") - 1
        members_of_shards = members - self._first_members[shards]
        return self._shards[shards].tolist(), members_of_shards.tolist(), samples

    def _index(self, i: Indices) -> Indices:
        """Index, in the epoch's order of samples, of what is read i-th: run i mod C, at its (i div C)-th sample."""
        length, longer = divmod(self.samples, self.streams)  # the first `longer` runs have one sample more
        nth, run = np.divmod(i, self.streams)
        return run * length + np.minimum(run, longer) + nth

    def _make_epoch(self, epoch: int) -> tuple[Indices, Indices]:
        """The members in the order of an epoch, and where each of them ends in its order of samples."""
        members = permutation(rng.key(self.seed, "order of members", epoch), len(self._counts))
        return members, np.cumsum(self._counts[members])

    def _make_within(self, epoch: int, member: int) -> list[int]:
        return permutation(rng.key(self.seed, "order of samples", epoch, member), int(self._counts[member])).tolist()


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
