"""A checkpoint written by one process out of logical tensors, for tools that make one from something else."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rdm_scale.checkpoint.directory import CheckpointDirectory
from rdm_scale.checkpoint.format.index import FileRecord
from rdm_scale.checkpoint.format.slices import SliceTable, TensorSlice, regions_of_range
from rdm_scale.checkpoint.format.writer import write_tensors
from rdm_scale.storage.location import Location

STATE_ENTRIES = ("weights", "exp_avg", "exp_avg_sq", "ema")  # of a checkpoint that training goes on from
FILE_ELEMENTS = 2**24  # of each field in one file: 64 MiB, what the writer holds in memory

Named = tuple[str, Mapping[str, Tensor]]


def write_checkpoint(
    directory: CheckpointDirectory,
    state: Mapping[str, Any],
    tensors: Iterable[Named],
    file_elements: int = FILE_ELEMENTS,
) -> Location:
    """Writes the checkpoint of `state["step"]`, in place of an earlier one of that step, complete on return.

    Tensors are taken one by one as they come and cut over as many files as it takes, so that memory holds
    `file_elements` of each field and one tensor, whatever the size of the whole.

    Args:
        state: JSON, as `Trainer.save` writes it; its `layout` says who wrote the checkpoint.
        tensors: (name, {field: tensor}), each name once; of any float type, all fields of the tensor's logical shape.
            A field that is one number everywhere may be an expanded scalar.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: it cannot be written. Then, as with whatever `tensors` raises, none of it is left.
    """
    step = state["step"]
    folder = directory.begin(step)
    try:
        files: list[FileRecord] = []
        for number, (pieces, fields) in enumerate(_filled(tensors, file_elements)):
            files += write_tensors(folder, number, pieces, fields)
        directory.commit(step, state, files)
    except BaseException:
        directory.abandon(step)
        raise
    return folder


def _filled(tensors: Iterable[Named], capacity: int) -> Iterator[tuple[SliceTable, dict[str, Tensor]]]:
    """The tensors one after the other in flat buffers, which are handed out as often as they are full."""
    seen: set[str] = set()
    buffers: dict[str, Tensor] = {}
    pieces: list[TensorSlice] = []
    start = 0
    for name, fields in tensors:
        if name in seen:
            raise ValueError(f"{name} is given twice")
        seen.add(name)
        buffers = buffers or {field: torch.empty(capacity) for field in fields}
        shapes = {tuple(tensor.shape) for tensor in fields.values()}
        if fields.keys() != buffers.keys() or len(shapes) != 1:
            raise ValueError(f"{name} must have the fields {', '.join(buffers)}, all of one shape")
        shape = shapes.pop()
        for first, count in _ranges(math.prod(shape), capacity, start):
            for box in regions_of_range(shape, first, count):
                where = tuple(slice(o, o + n) for o, n in zip(box.offset, box.extent, strict=True))
                for field, tensor in fields.items():
                    buffers[field][start : start + box.numel].view(box.extent).copy_(tensor[where])
                pieces.append(TensorSlice(name, shape, box, start))
                start += box.numel
            if start == capacity:
                yield SliceTable.of(pieces), buffers
                pieces, start = [], 0
    if pieces:
        yield SliceTable.of(pieces), buffers


def _ranges(elements: int, capacity: int, start: int) -> Iterator[tuple[int, int]]:
    """(first, count) of the ranges that a tensor is cut into where buffers, of which `start` is taken, are full."""
    first = 0
    while first < elements:
        count = min(elements - first, capacity - start)
        yield first, count
        first, start = first + count, 0
