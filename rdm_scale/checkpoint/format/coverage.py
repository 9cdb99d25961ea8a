"""Which files of a checkpoint can hold what a rank needs, found without opening them.

A file's spans are a coarse upper bound of its pieces, small enough to stand in the commit: a range of tensor names,
and a range of each of those tensors from its first to its last element, as fractions of the flattened whole. With
thousands of ranks a reader then opens the indices of some dozens of files instead of all; what exactly they hold is
for those indices to say. A span may claim more than is there, never less.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from functools import lru_cache
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from rdm_scale.checkpoint.format.overlap import Ints, strides_of
from rdm_scale.checkpoint.format.slices import Pieces

_STEPS = 64  # tensors of a file are bounded together where they lie in the same steps of the way through
Fractions = NDArray[np.float64]
_Fraction = Annotated[float, Field(ge=0, le=1)]


class Span(BaseModel):
    """Tensors from `first` to `last` in the order of `name_order`, each from `low` to `high` of its elements."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    first: str = Field(max_length=1024)
    last: str = Field(max_length=1024)
    low: _Fraction
    high: _Fraction


@lru_cache(2**17)
def name_order(name: str) -> tuple[Any, ...]:
    """Sorts blocks.9 before blocks.10, so that neighbours in a model are neighbours in this order."""
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name))


def spans_of(pieces: Pieces) -> tuple[Span, ...]:
    """The spans of a file that holds these pieces."""
    held, low, high = _reach(pieces)
    steps = np.floor(low * _STEPS) * (_STEPS + 1) + np.ceil(high * _STEPS)
    _, group = np.unique(steps, return_inverse=True)
    found = []
    for i in range(group.max(initial=-1) + 1):
        members = np.flatnonzero(group == i)
        names = [pieces.names[tensor] for tensor in held[members].tolist()]
        first, last = min(names, key=name_order), max(names, key=name_order)
        found.append(Span(first=first, last=last, low=low[members].min(), high=high[members].max()))
    return tuple(found)


class Wanted:
    """Pieces made ready to be asked which spans may meet them."""

    def __init__(self, pieces: Pieces) -> None:
        held, low, high = _reach(pieces)
        orders = [name_order(pieces.names[tensor]) for tensor in held.tolist()]
        ranks = sorted(range(len(orders)), key=orders.__getitem__)
        self._order = [orders[i] for i in ranks]
        self._low, self._high = low[ranks], high[ranks]

    def meets(self, spans: Iterable[Span]) -> bool:
        return any(self._meets(span) for span in spans)

    def _meets(self, span: Span) -> bool:
        first = bisect_left(self._order, name_order(span.first))
        last = bisect_right(self._order, name_order(span.last))
        # inclusive: a fraction is rounded, and neighbours that only touch do no harm
        return bool(((self._low[first:last] <= span.high) & (self._high[first:last] >= span.low)).any())


def _reach(pieces: Pieces) -> tuple[Ints, Fractions, Fractions]:
    """The tensors that there are pieces of, and how far these reach, from the first to the last element, as fractions
    of each tensor."""
    boxes, shapes = pieces.boxes, np.maximum(pieces.shapes, 1)
    strides = strides_of(shapes)[:, boxes.tensor]
    begin = (boxes.offset * strides).sum(axis=0)
    end = begin + ((boxes.extent - 1) * strides).sum(axis=0) + 1
    total = shapes.prod(axis=0)
    low, high = total.copy(), np.zeros_like(total)
    np.minimum.at(low, boxes.tensor, begin)
    np.maximum.at(high, boxes.tensor, end)
    held = np.flatnonzero(high)
    return held, low[held] / total[held], high[held] / total[held]
