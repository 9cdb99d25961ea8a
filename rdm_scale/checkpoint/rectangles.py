"""Which part of a logical tensor lies where: rectangles, one by one and in bulk.

A ZeRO-3 rank holds a contiguous range of each flattened tensor. In terms of the logical tensor such a range is a few
rectangles, and rectangles of any two layouts intersect in rectangles: all that loading under another layout needs.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_PAIRS = 2**20  # candidate pairs looked at together, so that memory stays bounded whatever a file claims


class Rectangle(NamedTuple):
    """The elements offset <= index < offset + extent of a tensor; of a scalar, both are ()."""

    offset: tuple[int, ...]
    extent: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.extent)

    def overlap(self, other: "Rectangle") -> "Rectangle | None":
        """What both hold, or None."""
        low = tuple(map(max, self.offset, other.offset))
        high = tuple(map(min, self._end, other._end))
        extent = tuple(end - begin for begin, end in zip(low, high, strict=True))
        return Rectangle(low, extent) if all(n > 0 for n in extent) else None

    @property
    def _end(self) -> tuple[int, ...]:
        return tuple(o + n for o, n in zip(self.offset, self.extent, strict=True))

    def shifted(self, offset: Sequence[int]) -> "Rectangle":
        """The same rectangle seen from the logical tensor in which this one's tensor is the slice at `offset`."""
        return Rectangle(tuple(a + b for a, b in zip(self.offset, offset, strict=True)), self.extent)


class Piece(NamedTuple):
    """A rectangle of the logical tensor `name` of the whole `shape`, lying row by row from element `start` of a flat
    buffer."""

    name: str
    shape: tuple[int, ...]
    rectangle: Rectangle
    start: int


def rectangles_of_range(shape: Sequence[int], first: int, count: int) -> list[Rectangle]:
    """Elements `first` to `first + count` of a flattened tensor as rectangles, in flat order, each contiguous in it.

    There are at most 2 n - 1 of them for n dimensions: the ends of rows that the range cuts, and whole rows between.
    """
    total = math.prod(shape)
    if first < 0 or count < 0 or first + count > total:
        raise ValueError(f"elements {first} to {first + count} are not all in a tensor of shape {tuple(shape)}")
    if count == total > 0:
        return [Rectangle((0,) * len(shape), tuple(shape))]
    return _split(tuple(shape), first, count)


def _split(shape: tuple[int, ...], first: int, count: int) -> list[Rectangle]:
    if count == 0:
        return []
    if len(shape) < 2:
        return [Rectangle((first,), (count,))] if shape else [Rectangle((), ())]
    inner = shape[1:]
    row_size = math.prod(inner)
    row, column = divmod(first, row_size)
    found: list[Rectangle] = []
    if column:
        head = min(count, row_size - column)
        found += [_in_row(row, part) for part in _split(inner, column, head)]
        row, count = row + 1, count - head
    rows, tail = divmod(count, row_size)
    if rows:
        found.append(Rectangle((row, *(0 for _ in inner)), (rows, *inner)))
    return found + [_in_row(row + rows, part) for part in _split(inner, 0, tail)]


def _in_row(row: int, part: Rectangle) -> Rectangle:
    return Rectangle((row, *part.offset), (1, *part.extent))


@dataclass(frozen=True)
class Boxes:
    """P rectangles of numbered tensors as arrays. Shapes with fewer than N dimensions are padded with trailing ones,
    which changes neither their order of elements nor their number."""

    tensor: Ints  # [P]
    offset: Ints  # [P, N]
    extent: Ints  # [P, N]
    start: Ints  # [P], of the first element in a flat buffer

    @staticmethod
    def of(pieces: Sequence[Piece], numbers: Mapping[str, int], dimensions: int) -> "Boxes":
        rows, ones, zeros = [], [(1,) * n for n in range(dimensions + 1)], [(0,) * n for n in range(dimensions + 1)]
        for piece in pieces:
            box, missing = piece.rectangle, dimensions - len(piece.shape)
            rows.append((numbers[piece.name], piece.start, *box.offset, *zeros[missing], *box.extent, *ones[missing]))
        table = np.array(rows, np.int64).reshape(len(rows), 2 + 2 * dimensions)
        return Boxes(table[:, 0], table[:, 2 : 2 + dimensions], table[:, 2 + dimensions :], table[:, 1])

    @property
    def numel(self) -> Ints:
        return self.extent.prod(axis=1)

    @property
    def strides(self) -> Ints:
        """[P, N]: elements between neighbours along each dimension, within a rectangle's own buffer."""
        return strides_of(self.extent)

    def overlap(self, other: "Boxes") -> Ints:
        """[P, N]: the extents of what row i of both holds."""
        ends = np.minimum(self.offset + self.extent, other.offset + other.extent)
        return ends - np.maximum(self.offset, other.offset)

    def take(self, which: NDArray) -> "Boxes":
        return Boxes(self.tensor[which], self.offset[which], self.extent[which], self.start[which])


def strides_of(extent: Ints) -> Ints:
    """[P, N] row-major strides of the extents [P, N]."""
    inner = np.ones_like(extent)
    inner[:, :-1] = np.cumprod(extent[:, :0:-1], axis=1)[:, ::-1]
    return inner


class Atlas:
    """Rectangles made ready to be asked which of them meet others.

    All tensors are laid end to end; a rectangle's span runs from its first to its last element on that line. Spans
    sorted by where they begin are searched by bisection, so that the work is about the number of true neighbours.

    Args:
        boxes: P rectangles.
        shapes: [T, N], padded shapes of the tensors that they are of; all elements together below 2^62.
    """

    def __init__(self, boxes: Boxes, shapes: Ints) -> None:
        self._strides = strides_of(shapes)
        self._base = np.concatenate([[0], np.cumsum(shapes.prod(axis=1))])
        self._order = np.argsort(self._spans(boxes)[0], kind="stable")
        self._boxes = boxes.take(self._order)
        self._begins, ends = self._spans(self._boxes)
        self._ends = np.maximum.accumulate(ends) if len(ends) else ends

    def _spans(self, boxes: Boxes) -> tuple[Ints, Ints]:
        strides = self._strides[boxes.tensor]
        begins = self._base[boxes.tensor] + (boxes.offset * strides).sum(axis=1)
        return begins, begins + ((boxes.extent - 1) * strides).sum(axis=1) + 1

    def meeting(self, others: Boxes) -> Iterator[tuple[Ints, Ints]]:
        """Index pairs (into `others`, into the boxes of this atlas) of all rectangles that overlap, part by part."""
        begins, ends = self._spans(others)
        first = np.searchsorted(self._ends, begins, side="right")
        counts = np.maximum(np.searchsorted(self._begins, ends, side="left") - first, 0)
        total = np.cumsum(counts)
        done = 0
        while done < len(counts):
            until = int(np.searchsorted(total, (total[done - 1] if done else 0) + _PAIRS, side="right"))
            part = slice(done, max(until, done + 1))
            done = part.stop
            n = counts[part]
            theirs = np.repeat(np.arange(part.start, part.start + len(n)), n)
            mine = np.arange(n.sum()) + np.repeat(first[part] - (np.cumsum(n) - n), n)
            a, b = others.take(theirs), self._boxes.take(mine)
            low, high = np.maximum(a.offset, b.offset), np.minimum(a.offset + a.extent, b.offset + b.extent)
            meet = (a.tensor == b.tensor) & (low < high).all(axis=1)
            yield theirs[meet], self._order[mine[meet]]


@dataclass(frozen=True)
class Copies:
    """K copies out of flat buffers into one, by ascending source; all numbers count elements."""

    source: Ints  # [K], of the first element
    span: Ints  # [K], from the first to the last element in the source
    target: Ints  # [K]
    contiguous: NDArray[np.bool_]  # [K]: one run on both sides; otherwise strided as follows
    extent: Ints  # [K, N]
    source_strides: Ints  # [K, N]
    target_strides: Ints  # [K, N]
    reach: int  # elements of the target up to the last that is filled


def copies_between(source: Boxes, target: Boxes) -> Copies:
    """What overlap of which two rectangles (row i of `source` and of `target`) goes where; neighbours are joined."""
    low = np.maximum(source.offset, target.offset)
    extent = source.overlap(target)
    begin = source.start + ((low - source.offset) * source.strides).sum(axis=1)
    goal = target.start + ((low - target.offset) * target.strides).sum(axis=1)
    span = ((extent - 1) * source.strides).sum(axis=1) + 1
    goal_span = ((extent - 1) * target.strides).sum(axis=1) + 1
    numel = extent.prod(axis=1)
    contiguous = (span == numel) & (goal_span == numel)

    order = np.argsort(begin, kind="stable")
    begin, goal, span, contiguous = begin[order], goal[order], span[order], contiguous[order]
    joined = contiguous[1:] & contiguous[:-1]
    joined &= (begin[1:] == (begin + span)[:-1]) & (goal[1:] == (goal + span)[:-1])
    firsts = np.flatnonzero(np.concatenate([[True], ~joined])[: len(begin)])
    total = np.add.reduceat(span, firsts) if len(firsts) else span
    rows = order[firsts]
    return Copies(
        begin[firsts], total, goal[firsts], contiguous[firsts],
        extent[rows], source.strides[rows], target.strides[rows],
        int((target.start + target.numel).max(initial=0)),
    )  # fmt: skip
