"""Which part of a logical tensor lies where: rectangles in bulk.

A ZeRO-3 rank holds a contiguous range of each flattened tensor. In terms of the logical tensor such a range is a few
rectangles, and rectangles of any two layouts intersect in rectangles: all that loading under another layout needs.
A model has thousands of tensors, and a rank plans in milliseconds: hence arrays, never an object a tensor. They are
[N, P], a row a dimension, so that arithmetic runs along memory (and `take` is much faster on them than an index).
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rdm_scale.errors import CheckpointError

Ints = NDArray[np.int64]
_PAIRS = 2**20  # candidate pairs looked at together, so that memory stays bounded whatever a file claims
_FEW_NEIGHBOURS, _NEIGHBOURS = 10**7, 1000  # pairs of spans that are looked at: so many, and so many a rectangle


class Rectangle(NamedTuple):
    """The elements offset <= index < offset + extent of a tensor; of a scalar, both are ()."""

    offset: tuple[int, ...]
    extent: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.extent)


@dataclass(frozen=True)
class Boxes:
    """P rectangles of numbered tensors. Tensors with fewer than N dimensions are padded with trailing ones, which
    changes neither their order of elements nor their number."""

    tensor: Ints  # [P]
    offset: Ints  # [N, P]
    extent: Ints  # [N, P]
    start: Ints  # [P], of the first element in a flat buffer, in which it lies row by row

    @property
    def numel(self) -> Ints:
        return self.extent.prod(axis=0)

    def take(self, which: NDArray) -> "Boxes":
        return Boxes(self.tensor[which], self.offset.take(which, 1), self.extent.take(which, 1), self.start[which])


def padded(rows: Sequence[Sequence[int]], dimensions: int, fill: int = 0) -> Ints:
    """[N, T] out of T rows of up to N numbers. Of shapes, filled with 0 (which no dimension can be) or 1."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    table = np.full((len(rows), dimensions), fill, np.int64)
    table[np.arange(dimensions) < lengths[:, None]] = np.fromiter(itertools.chain.from_iterable(rows), np.int64)
    return np.ascontiguousarray(table.T)


def deepened(columns: Ints, dimensions: int, fill: int = 0) -> Ints:
    """[N, P] out of columns of fewer dimensions."""
    missing = np.full((dimensions - len(columns), columns.shape[1]), fill, np.int64)
    return np.concatenate([columns, missing])


def strides_of(extent: Ints) -> Ints:
    """[N, P] row-major strides of the extents [N, P]."""
    strides = np.ones_like(extent)
    for d in range(len(extent) - 2, -1, -1):
        np.multiply(strides[d + 1], extent[d + 1], out=strides[d])
    return strides


def rectangles_of_range(shape: Sequence[int], first: int, count: int) -> list[Rectangle]:
    """Elements `first` to `first + count` of a flattened tensor as rectangles, in flat order, each contiguous in it.

    There are at most 2 n - 1 of them for n dimensions: the ends of rows that the range cuts, and whole rows between.
    """
    n = len(shape)
    boxes = boxes_of_ranges(padded([shape], max(n, 1), 1), *(np.array([i], np.int64) for i in (first, count, 0)))
    sides = (side[:n].T.tolist() for side in (boxes.offset, boxes.extent))
    return [Rectangle(tuple(offset), tuple(extent)) for offset, extent in zip(*sides, strict=True)]


def boxes_of_ranges(shapes: Ints, first: Ints, count: Ints, start: Ints) -> Boxes:
    """One range of each of T flattened tensors, as `rectangles_of_range` says.

    Args:
        shapes: [N, T], padded with 1.
        first, count: [T] elements of the flattened tensors.
        start: [T] places of the ranges in a flat buffer.
    """
    strides = strides_of(shapes)
    wholes = strides * shapes  # of a dimension: the elements of all it spans
    begin, end = first, first + count
    outside = np.flatnonzero((first < 0) | (count < 0) | (end > wholes[0]))
    for i in outside.tolist():
        raise ValueError(f"elements {begin[i]} to {end[i]} are not all in a tensor of shape {shapes[:, i].tolist()}")
    dimensions = len(shapes)
    parts = []
    heads = [(d, True) for d in range(dimensions - 1, 0, -1)]  # what completes cut rows, from the innermost outwards
    for d, is_head in (*heads, *((d, False) for d in range(dimensions))):  # then whole rows, and inwards what is left
        until = end // strides[d] * strides[d]
        if is_head:
            until = np.minimum(until, -(-begin // wholes[d]) * wholes[d])
        which = np.flatnonzero(until > begin)
        parts.append((which, begin[which], until[which], np.full(len(which), d)))
        begin = np.maximum(begin, until)
    tensor, begin, until, cut = (np.concatenate(side) for side in zip(*parts, strict=True))
    order = np.lexsort((begin, tensor))
    tensor, begin, until, cut = (side[order] for side in (tensor, begin, until, cut))
    size, stride = shapes.take(tensor, 1), strides.take(tensor, 1)
    level = np.arange(dimensions)[:, None]
    extent = np.where(level < cut, 1, np.where(level == cut, (until - begin) // stride, size))
    return Boxes(tensor, begin // stride % size, extent, start[tensor] + begin - first[tensor])


class Atlas:
    """Rectangles made ready to be asked which of them meet others.

    All tensors are laid end to end; a rectangle's span runs from its first to its last element on that line. Spans
    sorted by where they begin are searched by bisection, so that the work is about the number of true neighbours.

    Args:
        boxes: P rectangles.
        shapes: [N, T] of the tensors that they are of, padded with 1; all elements together below 2^62.
    """

    def __init__(self, boxes: Boxes, shapes: Ints) -> None:
        self._strides = strides_of(shapes)
        self._base = np.concatenate([[0], np.cumsum(shapes.prod(axis=0))])
        begins, ends = self._spans(boxes)
        self._order = np.argsort(begins, kind="stable")
        self._boxes = boxes.take(self._order)
        self._begins, self._ends = begins[self._order], np.maximum.accumulate(ends[self._order])

    def _spans(self, boxes: Boxes) -> tuple[Ints, Ints]:
        strides = self._strides.take(boxes.tensor, 1)
        begins = self._base[boxes.tensor] + (boxes.offset * strides).sum(axis=0)
        return begins, begins + ((boxes.extent - 1) * strides).sum(axis=0) + 1

    @property
    def is_disjoint(self) -> bool:
        """Whether not even the spans overlap; if some do, `meeting` with itself says which rectangles do."""
        return bool((self._begins[1:] >= self._ends[:-1]).all())

    def meeting(self, others: Boxes) -> Iterator[tuple[Ints, Ints]]:
        """Index pairs (into `others`, into the boxes of this atlas) of all rectangles that overlap, part by part.

        Raises:
            CheckpointError: their spans overlap in so many ways as no layout makes them, and looking would take hours.
        """
        begins, ends = self._spans(others)
        first = np.searchsorted(self._ends, begins, side="right")
        counts = np.maximum(np.searchsorted(self._begins, ends, side="left") - first, 0)
        total = np.cumsum(counts)
        if counts.sum() > _FEW_NEIGHBOURS + _NEIGHBOURS * (len(counts) + len(self._begins)):
            raise CheckpointError(
                f"{counts.sum():,} pairs of ranges may overlap: an index is damaged, or made to delay"
            )
        done = 0
        while done < len(counts):
            until = int(np.searchsorted(total, (total[done - 1] if done else 0) + _PAIRS, side="right"))
            part = slice(done, max(until, done + 1))
            done = part.stop
            n = counts[part]
            theirs = np.repeat(np.arange(part.start, part.start + len(n)), n)
            mine = np.arange(n.sum()) + np.repeat(first[part] - (np.cumsum(n) - n), n)
            a, b = others.take(theirs), self._boxes.take(mine)
            meet = (a.tensor == b.tensor) & (overlap(a, b)[1] > 0).all(axis=0)
            yield theirs[meet], self._order[mine[meet]]


def overlap(a: Boxes, b: Boxes) -> tuple[Ints, Ints]:
    """Offset and extent [N, P] of what box i of both holds; an extent of 0 or less says nothing."""
    low = np.maximum(a.offset, b.offset)
    return low, np.minimum(a.offset + a.extent, b.offset + b.extent) - low


@dataclass(frozen=True)
class Copies:
    """K copies out of flat buffers into one, by ascending source; all numbers count elements."""

    source: Ints  # [K], of the first element
    span: Ints  # [K], from the first to the last element in the source
    target: Ints  # [K]
    contiguous: NDArray[np.bool_]  # [K]: one run on both sides; otherwise strided as follows
    extent: Ints  # [N, K]
    source_strides: Ints  # [N, K]
    target_strides: Ints  # [N, K]


def copies_between(source: Boxes, target: Boxes) -> Copies:
    """What overlap of which two rectangles (box i of `source` and of `target`) goes where; neighbours are joined."""
    low, extent = overlap(source, target)
    strides, target_strides = strides_of(source.extent), strides_of(target.extent)
    begin = source.start + ((low - source.offset) * strides).sum(axis=0)
    goal = target.start + ((low - target.offset) * target_strides).sum(axis=0)
    span = ((extent - 1) * strides).sum(axis=0) + 1
    goal_span = ((extent - 1) * target_strides).sum(axis=0) + 1
    numel = extent.prod(axis=0)
    contiguous = (span == numel) & (goal_span == numel)

    order = np.argsort(begin, kind="stable")
    begin, goal, span, contiguous = begin[order], goal[order], span[order], contiguous[order]
    joined = contiguous[1:] & contiguous[:-1]
    joined &= (begin[1:] == (begin + span)[:-1]) & (goal[1:] == (goal + span)[:-1])
    firsts = np.flatnonzero(np.concatenate([[True], ~joined])[: len(begin)])
    total = np.add.reduceat(span, firsts) if len(firsts) else span
    which = order[firsts]
    return Copies(
        begin[firsts], total, goal[firsts], contiguous[firsts],
        extent.take(which, 1), strides.take(which, 1), target_strides.take(which, 1),
    )  # fmt: skip
