"""Writer of checkpoints from logical tensors on one process, for conversion tools."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rdm_scale.checkpoint.directory import CheckpointDirectory, os_errors_reported
from rdm_scale.checkpoint.format.index import FileRecord
from rdm_scale.checkpoint.format.slices import SliceTable, TensorSlice, regions_of_range
from rdm_scale.checkpoint.format.writer import write_tensors
from rdm_scale.checkpoint.ownership import refuse_other_owner
from rdm_scale.checkpoint.state import CheckpointState
from rdm_scale.storage.location import Location

STATE_ENTRIES = ("weights", "exp_avg", "exp_avg_sq", "ema")  # what training resumes from
FILE_ELEMENTS = 2**24  # of each state entry in one file: 64 MiB, which the writer holds in memory


NamedEntries = tuple[str, Mapping[str, Tensor]]  # name of a logical tensor, and its state entries


class _FileContent(NamedTuple):
    table: SliceTable
    buffers: dict[str, Tensor]  # of each state entry


class _FlatRange(NamedTuple):
    first: int
    elements: int


def write_checkpoint(
    directory: CheckpointDirectory,
    state: CheckpointState,
    tensors: Iterable[NamedEntries],
    file_elements: int = FILE_ELEMENTS,
) -> Location:
    """Write a complete checkpoint of `state["step"]`, replacing an earlier one of that step.

    Tensors are taken one by one and split over as many files as needed, so that memory holds `file_elements` of each
    state entry and one tensor.

    Args:
        directory: the directory of checkpoints.
        state: state of the run; its `layout` says who wrote the checkpoint.
        tensors: name and state entries of each logical tensor, without duplicates, in any floating-point type. An entry
            that is a single number may be an expanded scalar.
        file_elements: elements of each state entry per file.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: the checkpoint cannot be written. Its folder is removed, also after an error in `tensors`.
        OwnershipError: the directory belongs to a run.
    """
    step = state["step"]
    with os_errors_reported(f"read {directory.root}"):
        refuse_other_owner(directory.root, run=None, take_over=False)
    folder = directory.begin(step)
    try:
        files: list[FileRecord] = []
        for number, content in enumerate(_split_into_files(tensors, file_elements)):
            files += write_tensors(folder, number, content.table, content.buffers)
        directory.commit(step, state, files)
    except BaseException:
        directory.abandon(step)
        raise
    return folder


def _split_into_files(tensors: Iterable[NamedEntries], capacity: int) -> Iterator[_FileContent]:
    """Copy the tensors one after the other into flat buffers, which are yielded whenever they are full."""
    seen: set[str] = set()
    buffers: dict[str, Tensor] = {}
    slices: list[TensorSlice] = []
    start = 0
    for name, entries in tensors:
        if name in seen:
            raise ValueError(f"{name} is given twice")
        seen.add(name)
        buffers = buffers or {entry: torch.empty(capacity) for entry in entries}
        shapes = {tuple(tensor.shape) for tensor in entries.values()}
        if entries.keys() != buffers.keys() or len(shapes) != 1:
            raise ValueError(f"{name} must have the state entries {', '.join(buffers)}, all of one shape")
        shape = shapes.pop()
        for first, count in _ranges(math.prod(shape), capacity, start):
            for region in regions_of_range(shape, first, count):
                selection = tuple(slice(o, o + n) for o, n in zip(region.offset, region.extent, strict=True))
                for entry, tensor in entries.items():
                    buffers[entry][start : start + region.numel].view(region.extent).copy_(tensor[selection])
                slices.append(TensorSlice(name, shape, region, start))
                start += region.numel
            if start == capacity:
                yield _FileContent(SliceTable.of(slices), buffers)
                slices, start = [], 0
    if slices:
        yield _FileContent(SliceTable.of(slices), buffers)


def _ranges(elements: int, capacity: int, start: int) -> Iterator[_FlatRange]:
    """Split a tensor over buffers of `capacity` elements, the first of which already holds `start` elements."""
    first = 0
    while first < elements:
        count = min(elements - first, capacity - start)
        yield _FlatRange(first, count)
        first, start = first + count, 0
