"""Between a parallel model and a checkpoint: every rank has its own ranges of it, nothing is gathered."""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rdm_scale.checkpoint.directory import open_checkpoint
from rdm_scale.checkpoint.format.slices import SliceTable, max_dimensions, pad_rows, slices_of_ranges
from rdm_scale.storage.location import Location

if TYPE_CHECKING:
    from rdm_scale.parallel.zero.engine import Shard, ZeroEngine


def load(url: str, engine: "ZeroEngine", ema: list[Tensor]) -> None:
    """Sets weights, moments and averages from a checkpoint that any layout wrote. Collective.

    Raises:
        CheckpointError: it is incomplete, damaged, or lacks a part of this model.
    """
    pieces = slice_table(engine.shards)
    state, reader = open_checkpoint(Location(url), pieces)
    size = sum(flat.numel() for flat in ema)

    def fill(field: str, flats: list[Tensor]) -> None:
        whole = reader.fill(pieces, field, torch.zeros(size))
        for flat, part in zip(flats, whole.split([flat.numel() for flat in flats]), strict=True):
            flat.copy_(part)

    for field, flats in (*engine.moments(state["step"]).items(), ("ema", ema), ("weights", engine.masters)):
        fill(field, flats)
    engine.set_masters(engine.masters)


def slice_table(shards: "list[Shard]") -> SliceTable:
    """Slices of the logical tensors that a rank's parameter ranges hold."""
    held = [shard for shard in shards if shard.count]
    rows = [shard.shape for shard in held]
    dimensions = max_dimensions(rows)
    shapes = pad_rows(rows, dimensions)
    first, count, start = np.array([(s.first, s.count, s.start) for s in held], np.int64).reshape(-1, 3).T
    slices = slices_of_ranges(np.maximum(shapes, 1), first, count, start)
    tensor_parallel = {i: shard.part for i, shard in enumerate(held) if shard.part.count > 1}
    shift = np.zeros_like(shapes)
    for i, part in tensor_parallel.items():
        shift[part.dim, i] = shapes[part.dim, i] * part.index
        shapes[part.dim, i] *= part.count
    slices = replace(slices, offset=slices.offset + shift[:, slices.tensor])
    return SliceTable([shard.name for shard in held], shapes, slices)
