"""Slices of logical tensors and their places in a flat buffer.

A ZeRO-3 rank holds a contiguous range of each flattened tensor. Such a range consists of a few hyperrectangular regions
of the logical tensor, and the regions of any two layouts intersect in regions, so a checkpoint can be loaded under any
layout. A model has thousands of tensors and a rank plans in milliseconds, so slices are stored as arrays and not
as one object per tensor. The arrays have one row per dimension, so that arithmetic runs along contiguous memory, and
`take` is much faster on them than fancy indexing.

Shapes: N dimensions, T tensors, P slices. Tensors with fewer than N dimensions are padded with trailing dimensions.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Region(NamedTuple):
    """The elements offset <= index < offset + extent of a tensor. Both are () for a scalar."""

    offset: tuple[int, ...]
    extent: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.extent)


class TensorSlice(NamedTuple):
    """A region of a logical tensor, stored in row-major order from element `start` of a flat buffer."""

    name: str
    shape: tuple[int, ...]
    region: Region
    start: int


@dataclass(frozen=True)
class Slices:
    """P slices of numbered tensors, as arrays.

    Padding with dimensions of size 1 changes neither the order nor the number of elements.
    """

    tensor: Ints  # [P], number of the tensor
    offset: Ints  # [N, P]
    extent: Ints  # [N, P]
    start: Ints  # [P], position of the first element in a flat buffer, in which the slice is stored in row-major order

    @property
    def numel(self) -> Ints:
        return self.extent.prod(axis=0)

    def take(self, which: NDArray) -> "Slices":
        return Slices(self.tensor[which], self.offset.take(which, 1), self.extent.take(which, 1), self.start[which])


@dataclass(frozen=True)
class SliceTable:
    """P slices of T named tensors."""

    names: list[str]  # of the tensors, without duplicates
    shapes: Ints  # [N, T], 0 where a tensor has fewer than N dimensions
    slices: Slices  # of the tensors in the order of `names`

    @staticmethod
    def of(slices: Sequence[TensorSlice]) -> "SliceTable":
        """Build the table from single slices."""
        shapes = {item.name: item.shape for item in slices}
        numbers = {name: i for i, name in enumerate(shapes)}
        dimensions = max_dimensions(shapes.values())
        arrays = Slices(
            np.array([numbers[item.name] for item in slices], np.int64),
            pad_rows([item.region.offset for item in slices], dimensions),
            pad_rows([item.region.extent for item in slices], dimensions, 1),
            np.array([item.start for item in slices], np.int64),
        )
        return SliceTable(list(shapes), pad_rows(list(shapes.values()), dimensions), arrays)

    @staticmethod
    def of_tensors(names: list[str], shapes: Ints) -> "SliceTable":
        """Build the table of complete tensors of these shapes [N, T], stored one after the other."""
        extent = np.maximum(shapes, 1)
        sizes = extent.prod(axis=0)
        slices = Slices(np.arange(len(names)), np.zeros_like(extent), extent, np.cumsum(sizes) - sizes)
        return SliceTable(names, shapes, slices)

    @property
    def ends(self) -> Ints:
        """[P] positions in the flat buffer after the last element of each slice."""
        return self.slices.start + self.slices.numel

    @property
    def buffer_elements(self) -> int:
        """Smallest size of a flat buffer that contains all slices."""
        return int(self.ends.max(initial=0))


def max_dimensions(shapes: Iterable[Sequence[int]]) -> int:
    """N, at least 1: a scalar is treated as a vector of one element."""
    return max(1, max(map(len, shapes), default=1))


def shape_of(shapes: Ints, number: int) -> tuple[int, ...]:
    """Shape of one tensor from shapes [N, T] padded with 0."""
    column = shapes[:, number]
    return tuple(column[column > 0].tolist())


def pad_rows(rows: Sequence[Sequence[int]], dimensions: int, fill: int = 0) -> Ints:
    """[N, T] array of T rows with up to N numbers each, padded with `fill`. No dimension is 0, so 0 marks padding."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    table = np.full((len(rows), dimensions), fill, np.int64)
    table[np.arange(dimensions) < lengths[:, None]] = np.fromiter(itertools.chain.from_iterable(rows), np.int64)
    return np.ascontiguousarray(table.T)


def pad_dimensions(columns: Ints, dimensions: int, fill: int = 0) -> Ints:
    """Pad an array of fewer dimensions to [N, P]."""
    missing = np.full((dimensions - len(columns), columns.shape[1]), fill, np.int64)
    return np.concatenate([columns, missing])


def strides_of(extent: Ints) -> Ints:
    """[N, P] row-major strides of the extents [N, P]."""
    strides = np.ones_like(extent)
    for d in range(len(extent) - 2, -1, -1):
        np.multiply(strides[d + 1], extent[d + 1], out=strides[d])
    return strides


def regions_of_range(shape: Sequence[int], first: int, count: int) -> list[Region]:
    """Split elements `first` to `first + count` of a flattened tensor into regions, in flat order.

    Each region is contiguous in the flattened tensor. For n dimensions there are at most 2 n - 1 of them: the partial
    rows at both ends, and the complete rows between them.
    """
    n = len(shape)
    slices = slices_of_ranges(pad_rows([shape], max(n, 1), 1), *(np.array([i], np.int64) for i in (first, count, 0)))
    offsets, extents = slices.offset[:n].T.tolist(), slices.extent[:n].T.tolist()
    return [Region(tuple(offset), tuple(extent)) for offset, extent in zip(offsets, extents, strict=True)]


def slices_of_ranges(shapes: Ints, first: Ints, count: Ints, start: Ints) -> Slices:
    """Split one range of each of T flattened tensors into slices, as `regions_of_range` does.

    Args:
        shapes: [N, T], padded with 1.
        first: [T] position of the first element in the flattened tensor.
        count: [T] number of elements.
        start: [T] position of the range in a flat buffer.
    """
    strides = strides_of(shapes)
    sizes = strides * shapes  # elements that a complete dimension d spans
    begin, end = first, first + count
    outside = np.flatnonzero((first < 0) | (count < 0) | (end > sizes[0]))
    if len(outside):
        i = int(outside[0])
        raise ValueError(f"elements {begin[i]} to {end[i]} are not all in a tensor of shape {shapes[:, i].tolist()}")
    dimensions = len(shapes)
    parts = []
    heads = [(d, True) for d in range(dimensions - 1, 0, -1)]  # complete the partial rows, from the innermost dimension
    for d, is_head in (*heads, *((d, False) for d in range(dimensions))):  # then complete rows, then the remainder
        until = end // strides[d] * strides[d]
        if is_head:
            until = np.minimum(until, -(-begin // sizes[d]) * sizes[d])
        which = np.flatnonzero(until > begin)
        parts.append((which, begin[which], until[which], np.full(len(which), d)))
        begin = np.maximum(begin, until)
    tensor, begin, until, split = (np.concatenate(side) for side in zip(*parts, strict=True))
    order = np.lexsort((begin, tensor))
    tensor, begin, until, split = (side[order] for side in (tensor, begin, until, split))
    size, stride = shapes.take(tensor, 1), strides.take(tensor, 1)
    level = np.arange(dimensions)[:, None]
    extent = np.where(level < split, 1, np.where(level == split, (until - begin) // stride, size))
    return Slices(tensor, begin // stride % size, extent, start[tensor] + begin - first[tensor])
