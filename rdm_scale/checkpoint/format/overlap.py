"""Overlap queries over tensor slices, and the copies that they need.

Shapes: N dimensions, T tensors, P slices, K copies.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rdm_scale.checkpoint.format.slices import Ints, Slices, strides_of
from rdm_scale.errors import CheckpointError

PAIRS_AT_ONCE = 2**20  # candidate pairs compared in one array, which bounds the memory for any content of a file
_MAX_PAIRS, _MAX_PAIRS_PER_SLICE = 10**7, 1000  # candidates beyond both limits together are refused


class OverlapPairs(NamedTuple):
    """Index pairs of overlapping slices: `query[i]` of the query overlaps `indexed[i]` of the index."""

    query: Ints
    indexed: Ints


class SliceIndex:
    """Interval index over tensor slices for overlap queries.

    All tensors are laid end to end on one line. A slice's interval reaches from its first to its last element on that
    line. Intervals sorted by their start are searched by bisection, so the cost of a query is about proportional to the
    number of overlapping slices.

    Args:
        slices: the P slices to search.
        shapes: [N, T] shapes of their tensors, padded with 1; all elements together below 2^62.
    """

    def __init__(self, slices: Slices, shapes: Ints) -> None:
        self._strides = strides_of(shapes)
        self._base = np.concatenate([[0], np.cumsum(shapes.prod(axis=0))])
        begins, ends = self._intervals(slices)
        self._order = np.argsort(begins, kind="stable")
        self._slices = slices.take(self._order)
        self._begins, self._ends = begins[self._order], np.maximum.accumulate(ends[self._order])

    def _intervals(self, slices: Slices) -> tuple[Ints, Ints]:
        strides = self._strides.take(slices.tensor, 1)
        begins = self._base[slices.tensor] + (slices.offset * strides).sum(axis=0)
        return begins, begins + ((slices.extent - 1) * strides).sum(axis=0) + 1

    @property
    def is_disjoint(self) -> bool:
        """True if not even the intervals overlap; otherwise query the index with its own slices."""
        return bool((self._begins[1:] >= self._ends[:-1]).all())

    def overlapping(self, query: Slices, pairs_at_once: int = PAIRS_AT_ONCE) -> Iterator[OverlapPairs]:
        """Find all indexed slices that overlap slices of the query, in batches.

        Args:
            query: slices of the same tensors.
            pairs_at_once: candidate pairs to compare in one batch.

        Raises:
            CheckpointError: more intervals overlap than in any possible layout, and the search would take hours.
        """
        begins, ends = self._intervals(query)
        first = np.searchsorted(self._ends, begins, side="right")
        counts = np.maximum(np.searchsorted(self._begins, ends, side="left") - first, 0)
        total = np.cumsum(counts)
        if counts.sum() > _MAX_PAIRS + _MAX_PAIRS_PER_SLICE * (len(counts) + len(self._begins)):
            raise CheckpointError(
                f"{counts.sum():,} pairs of slices may overlap, which no layout can cause: an index is damaged or "
                "malicious; use another checkpoint"
            )
        done = 0
        while done < len(counts):
            until = int(np.searchsorted(total, (total[done - 1] if done else 0) + pairs_at_once, side="right"))
            part = slice(done, max(until, done + 1))
            done = part.stop
            n = counts[part]
            asked = np.repeat(np.arange(part.start, part.start + len(n)), n)
            found = np.arange(n.sum()) + np.repeat(first[part] - (np.cumsum(n) - n), n)
            a, b = query.take(asked), self._slices.take(found)
            overlap = (a.tensor == b.tensor) & (intersect(a, b).extent > 0).all(axis=0)
            yield OverlapPairs(asked[overlap], self._order[found[overlap]])


class Intersections(NamedTuple):
    """Regions that pairs of slices have in common. Slices with an extent of 0 or less do not overlap."""

    offset: Ints  # [N, P]
    extent: Ints  # [N, P]


def intersect(a: Slices, b: Slices) -> Intersections:
    """Intersect slice i of `a` with slice i of `b`."""
    low = np.maximum(a.offset, b.offset)
    return Intersections(low, np.minimum(a.offset + a.extent, b.offset + b.extent) - low)


@dataclass(frozen=True)
class CopyPlan:
    """K copies from flat buffers into one, sorted by source. All numbers count elements."""

    source: Ints  # [K], position of the first element
    span: Ints  # [K], from the first to the last element in the source
    target: Ints  # [K]
    contiguous: NDArray[np.bool_]  # [K], contiguous on both sides; otherwise strided as follows
    extent: Ints  # [N, K]
    source_strides: Ints  # [N, K]
    target_strides: Ints  # [N, K]


def plan_copies(source: Slices, target: Slices) -> CopyPlan:
    """Plan the copy of the overlap of `source[i]` and `target[i]` for all i; adjacent contiguous copies are merged."""
    low, extent = intersect(source, target)
    strides, target_strides = strides_of(source.extent), strides_of(target.extent)
    begin = source.start + ((low - source.offset) * strides).sum(axis=0)
    target_begin = target.start + ((low - target.offset) * target_strides).sum(axis=0)
    span = ((extent - 1) * strides).sum(axis=0) + 1
    target_span = ((extent - 1) * target_strides).sum(axis=0) + 1
    numel = extent.prod(axis=0)
    contiguous = (span == numel) & (target_span == numel)

    order = np.argsort(begin, kind="stable")
    begin, target_begin, span, contiguous = begin[order], target_begin[order], span[order], contiguous[order]
    merged = contiguous[1:] & contiguous[:-1]
    merged &= (begin[1:] == (begin + span)[:-1]) & (target_begin[1:] == (target_begin + span)[:-1])
    firsts = np.flatnonzero(np.concatenate([[True], ~merged])[: len(begin)])
    total = np.add.reduceat(span, firsts) if len(firsts) else span
    which = order[firsts]
    return CopyPlan(
        begin[firsts], total, target_begin[firsts], contiguous[firsts],
        extent.take(which, 1), strides.take(which, 1), target_strides.take(which, 1),
    )  # fmt: skip
