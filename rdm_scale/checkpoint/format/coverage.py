"""Coverage bounds: find the files of a checkpoint that may hold what a rank needs, without opening them.

The coverage bounds of a file are a coarse upper bound of its slices, small enough to be stored in `commit.json`: a
range of tensor names, and for each of these tensors a range from the first to the last element, as fractions of the
flattened tensor. With thousands of ranks, a reader then opens dozens of indices instead of all of them. The bounds may
claim more than a file holds, never less.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from functools import lru_cache
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from rdm_scale.checkpoint.format.slices import Ints, SliceTable, strides_of

_STEPS = 64  # tensors of a file share bounds if their ranges round to the same 64ths of the flattened tensor
_Fraction = Annotated[float, Field(ge=0, le=1)]


class CoverageBounds(BaseModel):
    """Tensors from `first` to `last` in the order of `name_order`, each from `low` to `high` of its elements."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    first: str = Field(max_length=1024)
    last: str = Field(max_length=1024)
    low: _Fraction
    high: _Fraction


@lru_cache(2**17)
def name_order(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key that puts blocks.9 before blocks.10, so that neighbors in a model are neighbors in this order."""
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name))


def coverage_bounds(table: SliceTable) -> tuple[CoverageBounds, ...]:
    """Coverage bounds of a file that holds these slices."""
    reach = _tensor_reach(table)
    steps = np.floor(reach.low * _STEPS) * (_STEPS + 1) + np.ceil(reach.high * _STEPS)
    _, group = np.unique(steps, return_inverse=True)
    found = []
    for i in range(group.max(initial=-1) + 1):
        members = np.flatnonzero(group == i)
        names = [table.names[tensor] for tensor in reach.tensor[members].tolist()]
        first, last = min(names, key=name_order), max(names, key=name_order)
        low, high = reach.low[members].min(), reach.high[members].max()
        found.append(CoverageBounds(first=first, last=last, low=low, high=high))
    return tuple(found)


class CoverageQuery:
    """Query for the files that may hold some of the given slices."""

    def __init__(self, table: SliceTable) -> None:
        reach = _tensor_reach(table)
        keys = [name_order(table.names[tensor]) for tensor in reach.tensor.tolist()]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        self._keys = [keys[i] for i in order]
        self._low, self._high = reach.low[order], reach.high[order]

    def may_overlap(self, bounds: Iterable[CoverageBounds]) -> bool:
        """True if a file with these bounds may hold a part of the slices."""
        return any(self._may_overlap(one) for one in bounds)

    def _may_overlap(self, bounds: CoverageBounds) -> bool:
        first = bisect_left(self._keys, name_order(bounds.first))
        last = bisect_right(self._keys, name_order(bounds.last))
        # Inclusive, because fractions are rounded; a false positive only opens one more index.
        return bool(((self._low[first:last] <= bounds.high) & (self._high[first:last] >= bounds.low)).any())


class _TensorReach(NamedTuple):
    """Range of each tensor from the first to the last element in a slice, as fractions of the flattened tensor."""

    tensor: Ints
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def _tensor_reach(table: SliceTable) -> _TensorReach:
    """Compute the range of each tensor that has slices in the table."""
    slices, shapes = table.slices, np.maximum(table.shapes, 1)
    strides = strides_of(shapes)[:, slices.tensor]
    begin = (slices.offset * strides).sum(axis=0)
    end = begin + ((slices.extent - 1) * strides).sum(axis=0) + 1
    total = shapes.prod(axis=0)
    low, high = total.copy(), np.zeros_like(total)
    np.minimum.at(low, slices.tensor, begin)
    np.maximum.at(high, slices.tensor, end)
    tensor = np.flatnonzero(high)
    return _TensorReach(tensor, low[tensor] / total[tensor], high[tensor] / total[tensor])
