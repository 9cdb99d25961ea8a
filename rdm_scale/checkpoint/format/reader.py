"""Reader of logical tensors from the slices that any number of ranks wrote.

A rank's file `rank_00000.safetensors` holds each state entry (weights, exp_avg, exp_avg_sq, ema) as one flat fp32
tensor. Its index `rank_00000.index.safetensors` says where each slice of each logical tensor is stored, and holds a
checksum of every block of the file, so that a range is verified by reading only the blocks that it touches.

Shapes: N dimensions, T tensors, P slices.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rdm_scale.checkpoint.format.coverage import CoverageQuery
from rdm_scale.checkpoint.format.index import BLOCK_BYTES, INDEX, MAX_ELEMENTS, FileRecord, IndexedFile, read_index
from rdm_scale.checkpoint.format.overlap import CopyPlan, OverlapPairs, SliceIndex, intersect, plan_copies
from rdm_scale.checkpoint.format.range_reader import FilePositions, RangeReader
from rdm_scale.checkpoint.format.slices import (
    Ints,
    Region,
    Slices,
    SliceTable,
    TensorSlice,
    pad_dimensions,
    shape_of,
)
from rdm_scale.errors import CheckpointError
from rdm_scale.storage.location import Location

_NO_PAIRS = OverlapPairs(np.empty(0, np.int64), np.empty(0, np.int64))


@dataclass(frozen=True)
class ReadOptions:
    """Sizes of reads. The defaults are for production; tests use smaller ones."""

    block_bytes: int = BLOCK_BYTES  # bytes per checksum, as in the writer
    window_blocks: int | None = None  # most blocks per read, see RangeReader
    unfiltered_indices: int = 32  # up to this number, all indices are opened regardless of their coverage bounds


class TensorReader:
    """Reader of logical tensors, or any slices of them, from the files of a checkpoint.

    Args:
        folder: the checkpoint's folder.
        records: records of all files of the checkpoint.
        needed: slices that will be read, if known; only files that may hold some of them are opened.
        options: sizes of reads.

    Raises:
        CheckpointError: an index is damaged or impossible, or two slices overlap; names the file or tensor.
    """

    def __init__(
        self,
        folder: Location,
        records: Sequence[FileRecord],
        needed: SliceTable | None = None,
        options: ReadOptions | None = None,
    ) -> None:
        options = options or ReadOptions()
        sizes = {record.name: record.bytes for record in records}
        indices = [r for r in records if r.name.startswith("rank_") and r.name.endswith(INDEX)]
        if not indices:
            raise CheckpointError(
                f"{folder} has no tensors: it contains no index rank_*{INDEX}; use another checkpoint"
            )
        if needed is not None and len(indices) > options.unfiltered_indices:
            query = CoverageQuery(needed)
            indices = [record for record in indices if query.may_overlap(record.spans)] or indices[:1]
        with ThreadPoolExecutor(min(len(indices), 16)) as pool:
            self.files = list(pool.map(lambda r: read_index(folder, r, sizes, options.block_bytes), indices))
        self._folder, self._range_reader = folder, RangeReader(self.files, options.window_blocks)
        self._numbers = _number_tensors(self.files)
        members = [_look_up(self._numbers, file.table.names) for file in self.files]
        self._shapes = _join_shapes(self.files, members, len(self._numbers))
        # Files are laid end to end with a gap of one element, so that no range reaches from one into the next.
        self._bases = np.cumsum([0, *(file.elements + 1 for file in self.files)])[:-1]
        self._slices = self._join_slices(members)
        self._index = SliceIndex(self._slices, np.maximum(self._shapes, 1))
        self._refuse_overlaps()
        self._plan: tuple[SliceTable, CopyPlan] | None = None

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._numbers)

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape of a tensor. Raises CheckpointError if the checkpoint does not have it."""
        return shape_of(self._shapes, self._number(name))

    def entries(self) -> list[str]:
        """State entries that every file has."""
        return [name for name in self.files[0].entries if all(name in file.entries for file in self.files)]

    def read(self, entry: str, name: str, region: Region | None = None) -> Tensor:
        """Read a logical tensor, or a region of it, in fp32. Raises CheckpointError as `fill` does.

        Complete blocks are read and verified: for many tensors `read_many` and `fill` cost far less.
        """
        shape = self.shape(name)
        region = region or Region((0,) * len(shape), shape)
        return self._read(SliceTable.of([TensorSlice(name, shape, region, 0)]), entry).view(region.extent)

    def read_many(self, entry: str, names: Sequence[str]) -> dict[str, Tensor]:
        """Read several logical tensors in fp32 into one shared buffer. Raises CheckpointError as `fill` does."""
        table = SliceTable.of_tensors(list(names), self._shapes[:, [self._number(name) for name in names]])
        parts = self._read(table, entry).split(table.slices.numel.tolist())
        return {name: part.view(self.shape(name)) for name, part in zip(names, parts, strict=True)}

    def fill(self, table: SliceTable, entry: str, out: Tensor) -> Tensor:
        """Fill a rank's flat buffer with one state entry; elements that no slice covers are left as they are.

        The plan is kept, so that several state entries of the same `table` object are planned once.

        Args:
            table: the slices and their places in the buffer.
            entry: name of the state entry.
            out: flat, contiguous fp32 CPU tensor.

        Returns:
            `out`.

        Raises:
            CheckpointError: a tensor or state entry is missing, has another shape, or lacks elements; a checksum
                differs (file and bytes are named); a file cannot be read. `out` may then hold damaged bytes.
        """
        if out.dtype != torch.float32 or out.ndim != 1 or out.device.type != "cpu" or not out.is_contiguous():
            raise ValueError("out must be a flat, contiguous fp32 CPU tensor")
        plan = self.plan(table)
        if table.buffer_elements > out.numel():
            raise ValueError(f"the slices reach to element {table.buffer_elements} of the {out.numel()} of out")
        self._execute(plan, entry, out)
        return out

    def plan(self, table: SliceTable) -> CopyPlan:
        """Plan the copies that fill `table`, the same for all state entries. Raises CheckpointError as `fill` does."""
        if self._plan is None or self._plan[0] is not table:
            self._plan = (table, self._plan_copies(table))
        return self._plan[1]

    def _number(self, name: str) -> int:
        if name not in self._numbers:
            raise CheckpointError(f"{self._folder} has no tensor {name}")
        return self._numbers[name]

    def _read(self, table: SliceTable, entry: str) -> Tensor:
        plan = self._plan_copies(table)  # finds missing elements before memory of a claimed size is allocated
        out = torch.empty(table.buffer_elements)
        self._execute(plan, entry, out)
        return out

    def _join_slices(self, members: list[Ints]) -> Slices:
        parts = []
        for file, numbers, base in zip(self.files, members, self._bases, strict=True):
            slices = _renumber(file.table.slices, numbers, len(self._shapes))
            parts.append((slices.tensor, slices.offset, slices.extent, slices.start + base))
        return Slices(*(np.concatenate(part, axis=-1) for part in zip(*parts, strict=True)))

    def _refuse_overlaps(self) -> None:
        if self._index.is_disjoint:
            return
        for first, second in self._index.overlapping(self._slices):
            for i, j in zip(first[first != second], second[first != second], strict=True):
                name = self.names()[self._slices.tensor[i]]
                files = sorted({str(self.files[k].data) for k in self._file_of(self._slices.start[[i, j]])})
                raise CheckpointError(
                    f"two slices of {name} overlap in {' and '.join(files)}: the index is damaged; use another "
                    "checkpoint"
                )

    def _file_of(self, positions: Ints) -> Ints:
        return np.searchsorted(self._bases, positions, side="right") - 1

    def _plan_copies(self, table: SliceTable) -> CopyPlan:
        needed = _renumber(table.slices, self._match_tensors(table), len(self._shapes))
        batches = self._index.overlapping(needed)
        query, stored = (np.concatenate(side) for side in zip(*batches, _NO_PAIRS, strict=True))
        source, target = self._slices.take(stored), needed.take(query)
        covered = np.zeros_like(needed.numel)
        np.add.at(covered, query, intersect(source, target).extent.prod(axis=0))
        if len(wrong := np.flatnonzero(covered != needed.numel)):
            i = int(wrong[0])
            tensor = table.slices.tensor[i]
            shape = shape_of(table.shapes, tensor)
            raise CheckpointError(
                f"{self._folder} lacks elements of {table.names[tensor]} {list(shape)}: it has {covered[i]} of the "
                f"{needed.numel[i]} elements needed from {needed.offset[: len(shape), i].tolist()} on"
            )
        return plan_copies(source, target)

    def _match_tensors(self, table: SliceTable) -> Ints:
        """[T] numbers of the table's tensors. Raises CheckpointError if one is missing or has another shape."""
        try:
            numbers = _look_up(self._numbers, table.names)
        except KeyError as error:
            raise CheckpointError(f"{self._folder} has no tensor {error.args[0]}") from None
        dimensions = max(len(self._shapes), len(table.shapes))
        needed = pad_dimensions(table.shapes, dimensions)
        stored = pad_dimensions(self._shapes.take(numbers, 1), dimensions)
        if len(wrong := np.flatnonzero((needed != stored).any(axis=0))):
            i = int(wrong[0])
            raise CheckpointError(
                f"{table.names[i]} has shape {list(shape_of(stored, i))} in {self._folder}, but "
                f"{list(shape_of(needed, i))} in this model"
            )
        return numbers

    def _execute(self, plan: CopyPlan, entry: str, out: Tensor) -> None:
        file = self._file_of(plan.source)
        positions = FilePositions(file, 4 * (plan.source - self._bases[file]))
        self._range_reader.execute(plan, positions, entry, out.detach().numpy())


def _number_tensors(files: Sequence[IndexedFile]) -> dict[str, int]:
    """Number the tensors of all files, by name."""
    numbers: dict[str, int] = {}
    for file in files:
        new = [name for name in file.table.names if name not in numbers]
        numbers.update(zip(new, range(len(numbers), len(numbers) + len(new)), strict=True))
    return numbers


def _look_up(numbers: Mapping[str, int], names: list[str]) -> Ints:
    if names == list(numbers):  # a single file, or the layout that wrote it: the comparison is cheaper
        return np.arange(len(names))
    return np.fromiter(map(numbers.__getitem__, names), np.int64, len(names))


def _join_shapes(files: Sequence[IndexedFile], members: list[Ints], tensors: int) -> Ints:
    """[N, T] shapes of all tensors, given the numbers of each file's tensors."""
    dimensions = max(len(file.table.shapes) for file in files)
    shapes = np.full((dimensions, tensors), -1, np.int64)
    for file, numbers in zip(files, members, strict=True):
        found, known = pad_dimensions(file.table.shapes, dimensions), shapes.take(numbers, 1)
        if len(wrong := np.flatnonzero(((known != found) & (known >= 0)).any(axis=0))):
            i = int(wrong[0])
            raise CheckpointError(
                f"{file.table.names[i]} has shape {list(shape_of(found, i))} in {file.data}, but "
                f"{list(shape_of(known, i))} in another file: an index is damaged; use another checkpoint"
            )
        shapes[:, numbers] = found
    if np.maximum(shapes, 1).prod(axis=0).sum(dtype=np.float64) > MAX_ELEMENTS:
        raise CheckpointError(
            f"the indices in {files[0].data.parent} claim more than {MAX_ELEMENTS:,} elements: use another checkpoint"
        )
    return shapes


def _renumber(slices: Slices, numbers: Ints, dimensions: int) -> Slices:
    """Replace the tensor numbers, and pad or truncate the arrays to `dimensions`, the most that a tensor has."""
    offset, extent = slices.offset[:dimensions], slices.extent[:dimensions]
    return Slices(
        numbers[slices.tensor], pad_dimensions(offset, dimensions), pad_dimensions(extent, dimensions, 1), slices.start
    )
