"""Global order of samples: closed forms and keyed permutations, without index files.

N samples are read in global batches of C. Global position P is place i = P mod N of epoch P div N and row P mod C of
its batch; step s (from 1) consumes positions (s - 1) C .. s C - 1, one per row. Epochs follow each other without a
gap, so samples that do not fill a batch are carried over to the next epoch. Within an epoch:

1. The members of each shard are grouped into contiguous reads, each large enough to be worth a request to an object
   store. The reads are permuted. Samples were shuffled over the whole data set when they were encoded, so neighboring
   samples are unrelated.
2. The N samples in that order are divided into C parts of N div C samples, or one more. Row i mod C of the batches
   walks through one part. A segment is what a row takes from one contiguous read: all of the read, or what lies in
   the row's part. The samples of each segment are permuted, too.

A batch thus takes its samples from C places of the data set, and a member is read by only the one or two ranks whose
rows walk through it, whatever the number of ranks. The order is a function of (seed, P), so starting at any step takes
constant time.
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

READ_BYTES = 2**22  # target size of a contiguous read, which takes much longer to transfer than to request
_FEWEST_READS = 64  # contiguous reads per data set (if it has that many members): fewer shuffle badly


class ContiguousRead(NamedTuple):
    """Neighboring members of one shard that are read by one request.

    Attributes:
        dataset: index of the data set.
        shard: index of the shard in its manifest.
        first: index of the first member.
        end: index after the last member.
    """

    dataset: int
    shard: int
    first: int
    end: int


class SampleLocation(NamedTuple):
    """Indices of a sample's shard, of its member in the shard, and of the sample in the member."""

    shard: int
    member: int
    sample: int


@dataclass(frozen=True, eq=False, slots=True)
class RowSegment:
    """Indices of the samples that one row of the batches takes from one contiguous read, in order.

    Compared by identity, because a batch looks up one segment per sample.
    """

    read: ContiguousRead
    samples: list[int]


class SegmentIndices(NamedTuple):
    """For each of several positions, the segment of its sample and the index of the sample in the segment."""

    segments: list[RowSegment]
    indices: list[int]


class _EpochOrder(NamedTuple):
    """The contiguous reads of an epoch in order, and the number of samples before each and after the last."""

    reads: Indices
    bounds: Indices


class _SegmentStarts(NamedTuple):
    """Starts of segments, counted through all epochs, and offsets in them."""

    starts: Indices
    offsets: Indices


class GlobalOrder:
    """Map from global positions to samples of a manifest, or of some of its shards.

    Args:
        global_batch_size: C.
        shards: indices of the shards to read; None: all.
        read_bytes: target size of a contiguous read, for data sets that are large enough.
        dataset: index of the data set, as recorded in each `ContiguousRead`.

    Attributes:
        samples: N.
        largest_read: upper bound of the bytes of a contiguous read.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        seed: int,
        global_batch_size: int,
        shards: Sequence[int] | None = None,
        read_bytes: int = READ_BYTES,
        dataset: int = 0,
    ) -> None:
        self.seed, self.global_batch_size, self.dataset = seed, global_batch_size, dataset
        self._shards = np.array(range(len(manifest.shards)) if shards is None else shards, np.int64)
        chosen = [manifest.shards[index] for index in self._shards]
        members = [member for shard in chosen for member in shard.members]
        self.samples = sum(shard.samples for shard in chosen)
        self._samples_before = np.cumsum([0, *(member.samples for member in members)])  # each member, and at the end
        self._members_before = np.cumsum([0] + [len(shard.members) for shard in chosen])  # each shard, and at the end
        sizes = [member.bytes for member in members]
        length = max(1, min(round(read_bytes * len(sizes) / sum(sizes)), len(sizes) // _FEWEST_READS))
        self.largest_read = length * (max(sizes) + 2 * BLOCKSIZE)  # with the headers in the tar
        ranges = zip(self._members_before[:-1], self._members_before[1:], strict=True)
        self._reads = np.concatenate([np.arange(first, end, length) for first, end in ranges])  # first member of each
        self._read_samples = np.diff(self._samples_before[self._reads], append=self.samples)
        rows, (part, longer) = np.arange(global_batch_size + 1), divmod(self.samples, global_batch_size)
        self._parts = rows * part + np.minimum(rows, longer)  # start of each row's part in an epoch, and the end
        # The table of an epoch is as long as the manifest; around the end of an epoch two of them are in use.
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        # Several planned steps share the segment that a row is at; the cache keeps it one object.
        self._segment = lru_cache(maxsize=4 * global_batch_size)(self._make_segment)

    def positions(self, step: int, dp_rank: int = 0, dp_size: int = 1) -> range:
        """The positions of a step (from 1) that a data-parallel rank reads: a contiguous share of the rows."""
        share = self.global_batch_size // dp_size
        first = (step - 1) * self.global_batch_size + dp_rank * share
        return range(first, first + share)

    def locations(self, positions: range) -> list[SampleLocation]:
        """Shard, member and index of the samples at consecutive global positions."""
        found = self.segments(positions)
        return [self._location(s.read, s.samples[i]) for s, i in zip(found.segments, found.indices, strict=True)]

    def segments(self, positions: range) -> SegmentIndices:
        """The segments of the samples at consecutive global positions.

        The same segment is the same object as long as a row walks through it.
        """
        starts: list[int] = []
        indices: list[int] = []
        while len(indices) < len(positions):
            epoch, first = divmod(positions.start + len(indices), self.samples)
            count = min(len(positions) - len(indices), self.samples - first)
            found = self._find_segments(epoch, np.arange(first, first + count))
            starts += found.starts.tolist()
            indices += found.offsets.tolist()
        return SegmentIndices([self._segment(start) for start in starts], indices)

    def _find_segments(self, epoch: int, places: Indices) -> _SegmentStarts:
        """Find the segments of some places of an epoch; place i is sample i div C of the part of row i mod C."""
        nth, row = np.divmod(places, self.global_batch_size)
        part_start = self._parts[row]
        index = part_start + nth
        bounds = self._epoch(epoch).bounds
        start = np.maximum(part_start, bounds[bounds.searchsorted(index, side="right") - 1])
        return _SegmentStarts(epoch * self.samples + start, index - start)

    def _location(self, read: ContiguousRead, sample: int) -> SampleLocation:
        base = self._members_before[np.searchsorted(self._shards, read.shard)]
        index = self._samples_before[base + read.first] + sample
        member = np.searchsorted(self._samples_before, index, side="right") - 1
        return SampleLocation(read.shard, int(member - base), int(index - self._samples_before[member]))

    def _make_epoch(self, epoch: int) -> _EpochOrder:
        reads = permutation(rng.key(self.seed, "order of runs", epoch), len(self._read_samples))
        return _EpochOrder(reads, np.cumsum(np.append(0, self._read_samples[reads])))

    def _make_segment(self, start: int) -> RowSegment:
        """Build the segment at `start`, counted through all epochs; it ends with its read or its row's part."""
        epoch, first = divmod(start, self.samples)
        order = self._epoch(epoch)
        nth = int(order.bounds.searchsorted(first, side="right")) - 1
        read, skipped = int(order.reads[nth]), first - int(order.bounds[nth])
        part_end = int(self._parts[self._parts.searchsorted(first, side="right")])
        size = min(int(order.bounds[nth + 1]), part_end) - first
        base = int(self._samples_before[self._reads[read]]) + skipped
        member = int(self._samples_before.searchsorted(base, side="right")) - 1
        end = int(self._samples_before.searchsorted(base + size, side="left"))
        shard = int(self._members_before.searchsorted(member, side="right")) - 1
        offset = int(self._members_before[shard])
        members = ContiguousRead(self.dataset, int(self._shards[shard]), member - offset, end - offset)
        samples = permutation(rng.key(self.seed, "order of samples", epoch, read, skipped), size)
        return RowSegment(members, (samples + (base - int(self._samples_before[member]))).tolist())


def permutation(key: int, size: int) -> Indices:
    """A random permutation of 0 .. size - 1 that is a function of (key, size) alone.

    Uses a bit generator and a stable sort, whose results NumPy guarantees to keep between releases. There is no such
    guarantee for NumPy's `Generator.permutation` or PyTorch's `randperm`.
    """
    return np.argsort(np.random.Philox(cast(Any, _Key(key))).random_raw(size), kind="stable")


class _Key(ISeedSequence):
    """Seed sequence with the effect of `Philox(key=...)`, which would gather entropy from the system and drop it."""

    def __init__(self, key: int) -> None:
        self._key = key

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> npt.NDArray[Any]:
        return np.array([self._key, 0], np.uint64)
