"""Between a parallel model and a checkpoint: every rank has its own ranges of it, nothing is gathered."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rdm_scale.checkpoint.directory import open_checkpoint
from rdm_scale.checkpoint.rectangles import Piece, rectangles_of_range
from rdm_scale.data.storage import Location

if TYPE_CHECKING:
    from rdm_scale.parallel.zero import Shard, ZeroEngine


def load(url: str, engine: "ZeroEngine", ema: list[Tensor]) -> None:
    """Sets weights, moments and averages from a checkpoint that any layout wrote. Collective.

    Raises:
        CheckpointError: it is incomplete, damaged, or lacks a part of this model.
    """
    pieces = pieces_of(engine.shards)
    state, reader = open_checkpoint(Location(url), pieces)
    size = sum(flat.numel() for flat in ema)

    def fill(field: str, flats: list[Tensor]) -> None:
        whole = reader.fill(pieces, field, torch.zeros(size))
        for flat, part in zip(flats, whole.split([flat.numel() for flat in flats]), strict=True):
            flat.copy_(part)

    for field, flats in (*engine.moments(state["step"]).items(), ("ema", ema), ("weights", engine.masters)):
        fill(field, flats)
    engine.set_masters(engine.masters)


def pieces_of(shards: "list[Shard]") -> list[Piece]:
    """A rank's ranges as rectangles of the logical tensors."""
    pieces = []
    for shard in shards:
        start, whole, offset = shard.start, shard.part.whole(shard.shape), shard.part.offset(shard.shape)
        for rectangle in rectangles_of_range(shard.shape, shard.first, shard.count):
            pieces.append(Piece(shard.name, whole, rectangle.shifted(offset), start))
            start += rectangle.numel
    return pieces
