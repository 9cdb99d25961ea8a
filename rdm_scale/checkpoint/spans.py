"""Which files of a checkpoint can hold what a rank needs, found without opening them.

A file's spans are a coarse upper bound of its pieces, small enough to stand in the commit: a range of tensor names,
and a range of each of those tensors from its first to its last element, as fractions of the flattened whole. With
thousands of ranks a reader then opens the indices of some dozens of files instead of all; what exactly they hold is
for those indices to say. A span may claim more than is there, never less.
"""

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from rdm_scale.checkpoint.rectangles import Piece

_STEPS = 64  # tensors of a file are bounded together where they lie in the same steps of the way through
_Fraction = Annotated[float, Field(ge=0, le=1)]


class Span(BaseModel):
    """Tensors from `first` to `last` in the order of `name_order`, each from `low` to `high` of its elements."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    first: str
    last: str
    low: _Fraction
    high: _Fraction


@lru_cache(2**17)
def name_order(name: str) -> tuple[Any, ...]:
    """Sorts blocks.9 before blocks.10, so that neighbours in a model are neighbours in this order."""
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name))


def spans_of(pieces: Sequence[Piece]) -> tuple[Span, ...]:
    """The spans of a file that holds these pieces."""
    grouped: dict[tuple[int, int], list[tuple[str, float, float]]] = {}
    for name, (low, high) in _reach(pieces).items():
        grouped.setdefault((int(low * _STEPS), math.ceil(high * _STEPS)), []).append((name, low, high))
    found = []
    for group in grouped.values():
        names, lows, highs = zip(*group, strict=True)
        first, last = min(names, key=name_order), max(names, key=name_order)
        found.append(Span(first=first, last=last, low=min(lows), high=max(highs)))
    return tuple(found)


class Wanted:
    """Pieces made ready to be asked which spans may meet them."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        reach = sorted((name_order(name), bounds) for name, bounds in _reach(pieces).items())
        self._order = [order for order, _ in reach]
        self._low, self._high = np.array([bounds for _, bounds in reach]).reshape(-1, 2).T

    def meets(self, spans: Iterable[Span]) -> bool:
        return any(self._meets(span) for span in spans)

    def _meets(self, span: Span) -> bool:
        first = bisect_left(self._order, name_order(span.first))
        last = bisect_right(self._order, name_order(span.last))
        # inclusive: a fraction is rounded, and neighbours that only touch do no harm
        return bool(((self._low[first:last] <= span.high) & (self._high[first:last] >= span.low)).any())


def _reach(pieces: Sequence[Piece]) -> dict[str, tuple[float, float]]:
    """How far each tensor's pieces reach, from their first to their last element, as fractions of the tensor."""
    reach: dict[str, tuple[float, float]] = {}
    for piece in pieces:
        begin, last, total = 0, 0, 1
        for size, offset, extent in zip(piece.shape, piece.rectangle.offset, piece.rectangle.extent, strict=True):
            begin, last, total = begin * size + offset, last * size + offset + extent - 1, total * size
        low, high = reach.get(piece.name, (1.0, 0.0))
        reach[piece.name] = min(low, begin / total), max(high, (last + 1) / total)
    return reach
