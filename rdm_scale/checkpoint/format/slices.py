"""What lies where in a flat buffer: rectangles of named tensors."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rdm_scale.checkpoint.format.overlap import Boxes, Ints, Rectangle, padded


class Piece(NamedTuple):
    """A rectangle of the logical tensor `name` of the whole `shape`, lying row by row from element `start` of a flat
    buffer."""

    name: str
    shape: tuple[int, ...]
    rectangle: Rectangle
    start: int


@dataclass(frozen=True)
class Pieces:
    """P pieces of T tensors, as arrays."""

    names: list[str]  # of the tensors, each once
    shapes: Ints  # [N, T], 0 where a tensor has fewer than N dimensions
    boxes: Boxes  # of the tensors in the order of `names`

    @staticmethod
    def of(pieces: Sequence[Piece]) -> "Pieces":
        shapes = {piece.name: piece.shape for piece in pieces}
        numbers = {name: i for i, name in enumerate(shapes)}
        dimensions = most_dimensions(shapes.values())
        boxes = Boxes(
            np.array([numbers[piece.name] for piece in pieces], np.int64),
            padded([piece.rectangle.offset for piece in pieces], dimensions),
            padded([piece.rectangle.extent for piece in pieces], dimensions, 1),
            np.array([piece.start for piece in pieces], np.int64),
        )
        return Pieces(list(shapes), padded(list(shapes.values()), dimensions), boxes)

    @staticmethod
    def whole(names: list[str], shapes: Ints) -> "Pieces":
        """Whole tensors of these shapes [N, T], one after the other."""
        extent = np.maximum(shapes, 1)
        sizes = extent.prod(axis=0)
        boxes = Boxes(np.arange(len(names)), np.zeros_like(extent), extent, np.cumsum(sizes) - sizes)
        return Pieces(names, shapes, boxes)

    @property
    def ends(self) -> Ints:
        """[P]: the elements of the buffer after each piece."""
        return self.boxes.start + self.boxes.numel


def most_dimensions(shapes: Iterable[Sequence[int]]) -> int:
    """N: at least 1, since a scalar is treated as a vector of one element."""
    return max(1, max(map(len, shapes), default=1))


def shape_of(shapes: Ints, number: int) -> tuple[int, ...]:
    """Of one tensor, out of [N, T] filled with 0."""
    column = shapes[:, number]
    return tuple(column[column > 0].tolist())
