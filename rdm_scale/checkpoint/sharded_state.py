"""Sharded loading: every rank of a parallel model reads its own parameter ranges."""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from rdm_scale.checkpoint.directory import read_contents
from rdm_scale.checkpoint.format.finite import refuse_non_finite_slices
from rdm_scale.checkpoint.format.slices import SliceTable, max_dimensions, pad_rows, slices_of_ranges
from rdm_scale.storage.location import Location

_ADVICE = "Remove that folder to go on from the checkpoint before it, or set checkpoint.resume to an earlier one"

if TYPE_CHECKING:
    from rdm_scale.parallel.parallel_model import ParallelModel
    from rdm_scale.parallel.zero.engine import ParameterRange


def load(url: str, model: "ParallelModel") -> None:
    """Load weights, optimizer state and EMA weights from a checkpoint of any layout. Collective.

    Raises:
        CheckpointError: it is incomplete or damaged, or lacks tensors of this model.
        NonFiniteError: it holds NaN or infinity.
    """
    table = slice_table(model.ranges)
    folder = Location(url)
    state, reader = model.mesh.on_first(lambda: read_contents(folder)).open(folder, table)
    with model.restoring(state["step"]) as buffers:
        for entry, flats in buffers._asdict().items():
            sizes = [flat.numel() for flat in flats]
            values = reader.fill(table, entry, torch.zeros(sum(sizes)))
            refuse_non_finite_slices(table, entry, values, f"{url} is complete, but cannot be used", _ADVICE)
            for flat, part in zip(flats, values.split(sizes), strict=True):
                flat.copy_(part)


def slice_table(ranges: "list[ParameterRange]") -> SliceTable:
    """Slices of the logical tensors that a rank's parameter ranges hold."""
    held = [one for one in ranges if one.numel]
    rows = [one.shape for one in held]
    dimensions = max_dimensions(rows)
    shapes = pad_rows(rows, dimensions)
    first, count, start = np.array([(s.first, s.numel, s.start) for s in held], np.int64).reshape(-1, 3).T
    slices = slices_of_ranges(np.maximum(shapes, 1), first, count, start)
    tensor_parallel = {i: one.part for i, one in enumerate(held) if one.part.count > 1}
    shift = np.zeros_like(shapes)
    for i, part in tensor_parallel.items():
        shift[part.dim, i] = shapes[part.dim, i] * part.index
        shapes[part.dim, i] *= part.count
    slices = replace(slices, offset=slices.offset + shift[:, slices.tensor])
    return SliceTable([one.name for one in held], shapes, slices)
