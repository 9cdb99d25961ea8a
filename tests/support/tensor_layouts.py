"""Small tensors, and the ways in which ranks of several layouts hold them."""

import itertools
import math
import random

import torch
from torch import Tensor

from rdm_scale.checkpoint.format.index import FileRecord
from rdm_scale.checkpoint.format.overlap import Rectangle, rectangles_of_range
from rdm_scale.checkpoint.format.slices import Piece, Pieces
from rdm_scale.checkpoint.format.writer import write_tensors
from rdm_scale.storage.location import Location

SHAPES: dict[str, tuple[int, ...]] = {
    "scale": (),
    "bias": (13,),
    "qkv.weight": (12, 7),  # split by rows under tensor parallelism
    "out.weight": (5, 8),  # split by columns
    "patch.weight": (4, 3, 2, 3),
    "positions": (1, 6, 5),
}
ROWS, COLUMNS = {"qkv.weight"}, {"out.weight"}
PADDING = -7.0  # what must neither be written nor overwritten


def layout(tensor_size: int, data_size: int, uneven: bool = False) -> list[list[Piece]]:
    """Pieces of every rank: slices of some tensors, each flattened slice then cut into ZeRO-3 ranges with padding."""
    rng = random.Random(0)
    ranks = []
    for tensor_rank, data_rank in itertools.product(range(tensor_size), range(data_size)):
        pieces, start = [], rng.randint(0, 3)
        for name, shape in SHAPES.items():
            local, offset = list(shape), [0] * len(shape)
            if name in ROWS | COLUMNS:
                dimension = 0 if name in ROWS else 1
                local[dimension] //= tensor_size
                offset[dimension] = tensor_rank * local[dimension]
            elif tensor_rank > 0:
                continue  # replicated: one of the ranks writes it
            size = math.prod(local)
            share = math.ceil(size / data_size)
            if uneven:
                share = max(1, share - 2)
            first = min(data_rank * share, size)
            count = size - first if data_rank == data_size - 1 else min(share, size - first)
            position = start
            for box in rectangles_of_range(local, first, count):
                pieces.append(Piece(name, shape, shifted(box, offset), position))
                position += box.numel
            start += max(share, count) + rng.randint(0, 2)
        ranks.append(pieces)
    return ranks


def shifted(box: Rectangle, offset: list[int]) -> Rectangle:
    return Rectangle(tuple(a + b for a, b in zip(box.offset, offset, strict=True)), box.extent)


def cut(tensor: Tensor, box: Rectangle) -> Tensor:
    return tensor[tuple(slice(o, o + n) for o, n in zip(box.offset, box.extent, strict=True))]


def flat(pieces: list[Piece], values: dict[str, Tensor]) -> Tensor:
    out = torch.full((max((p.start + p.rectangle.numel for p in pieces), default=0) + 2,), PADDING)
    for piece in pieces:
        out[piece.start : piece.start + piece.rectangle.numel] = cut(values[piece.name], piece.rectangle).flatten()
    return out


FIELDS = {
    field: {name: torch.randn(shape, generator=torch.Generator().manual_seed(i)) for name, shape in SHAPES.items()}
    for i, field in enumerate(("weights", "exp_avg", "exp_avg_sq", "ema"))
}
LAYOUTS = {
    "1": layout(1, 1),
    "dp2": layout(1, 2),
    "dp3": layout(1, 3),
    "dp4, uneven": layout(1, 4, uneven=True),
    "tp2": layout(2, 1),
    "tp2 dp3": layout(2, 3),
    "tp4 dp2, uneven": layout(4, 2, uneven=True),
    "dp17": layout(1, 17),
}


def write(folder: Location, ranks: list[list[Piece]]) -> list[FileRecord]:
    return [
        record
        for rank, pieces in enumerate(ranks)
        for record in write_tensors(
            folder, rank, Pieces.of(pieces), {f: flat(pieces, values) for f, values in FIELDS.items()}
        )
    ]
