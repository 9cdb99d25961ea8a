"""Tensors of a checkpoint: every rank writes its ranges as they lie, any rank reads whatever ranges it needs.

A rank's file `rank_00000.safetensors` holds each field (weights, moments, averages) as one flat fp32 tensor; the index
`rank_00000.index.safetensors` beside it says which rectangle of which logical tensor lies where, and holds a checksum
of every block of the file, so that any range is verified by reading the blocks that it touches.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from rdm_scale.checkpoint.format.coverage import Wanted
from rdm_scale.checkpoint.format.index import (
    INDEX,
    MAX_ELEMENTS,
    FileRecord,
    IndexedFile,
    read_index,
)
from rdm_scale.checkpoint.format.overlap import Atlas, Boxes, Copies, Ints, Rectangle, copies_between, deepened, overlap
from rdm_scale.checkpoint.format.range_reader import Sweeper
from rdm_scale.checkpoint.format.slices import Piece, Pieces, shape_of
from rdm_scale.errors import CheckpointError
from rdm_scale.storage.location import Location

_FEW_INDICES = 32
_NO_PAIRS = (np.empty(0, np.int64), np.empty(0, np.int64))


class TensorReader:
    """Reads logical tensors from whatever ranges any number of ranks wrote.

    Args:
        folder: where the files are.
        records: of all the checkpoint's files.
        pieces: what will be read, where that is known: then only the files that may hold some of it are opened.

    Raises:
        CheckpointError: an index is damaged or impossible, or two ranges overlap; names the file or tensor.
    """

    def __init__(self, folder: Location, records: Sequence[FileRecord], pieces: Pieces | None = None) -> None:
        sizes = {record.name: record.bytes for record in records}
        indices = [r for r in records if r.name.startswith("rank_") and r.name.endswith(INDEX)]
        if not indices:
            raise CheckpointError(f"{folder} holds no tensors: no index rank_*{INDEX} is part of it")
        if pieces is not None:
            indices = _needed(indices, pieces)
        with ThreadPoolExecutor(min(len(indices), 16)) as pool:
            self.files = list(pool.map(lambda record: read_index(folder, record, sizes), indices))
        self._folder, self._sweeper = folder, Sweeper(self.files)
        self._numbers = _numbers(self.files)
        members = [_look_up(self._numbers, file.pieces.names) for file in self.files]
        self._shapes = _join_shapes(self.files, members, len(self._numbers))
        # Files are laid end to end, one element apart, so that no range reaches from one into the next.
        self._bases = np.cumsum([0, *(file.elements + 1 for file in self.files)])[:-1]
        self._boxes = self._join_boxes(members)
        self._atlas = Atlas(self._boxes, np.maximum(self._shapes, 1))
        self._refuse_overlaps()
        self._plan: tuple[Pieces, Copies] | None = None

    def names(self) -> list[str]:
        return list(self._numbers)

    def shape(self, name: str) -> tuple[int, ...]:
        return shape_of(self._shapes, self._number(name))

    def fields(self) -> list[str]:
        """Those that every file has."""
        return [name for name in self.files[0].fields if all(name in file.fields for file in self.files)]

    def read(self, field: str, name: str, rectangle: Rectangle | None = None) -> Tensor:
        """A logical tensor, or a rectangle of it, in fp32. Raises CheckpointError as `fill` does.

        Whole blocks are read and verified: for many tensors `read_many` and `fill` cost far less.
        """
        shape = self.shape(name)
        box = rectangle or Rectangle((0,) * len(shape), shape)
        return self._read(Pieces.of([Piece(name, shape, box, 0)]), field).view(box.extent)

    def read_many(self, field: str, names: Sequence[str]) -> dict[str, Tensor]:
        """Several whole logical tensors in fp32, which share their memory. Raises CheckpointError as `fill` does."""
        pieces = Pieces.whole(list(names), self._shapes[:, [self._number(name) for name in names]])
        parts = self._read(pieces, field).split(pieces.boxes.numel.tolist())
        return {name: part.view(self.shape(name)) for name, part in zip(names, parts, strict=True)}

    def fill(self, pieces: Pieces, field: str, out: Tensor) -> Tensor:
        """Fills a rank's flat buffer; elements that no piece covers stay as they are.

        The plan is kept, so that several fields of the same `pieces` (the same object) cost one.

        Args:
            out: flat, contiguous fp32 CPU tensor.

        Returns:
            `out`.

        Raises:
            CheckpointError: a tensor or field is absent, of another shape, or has a hole; bytes differ from what was
                written (a file and offset are named); a file cannot be read. `out` may hold damaged bytes then.
        """
        if out.dtype != torch.float32 or out.ndim != 1 or out.device.type != "cpu" or not out.is_contiguous():
            raise ValueError("out must be a flat, contiguous fp32 CPU tensor")
        copies = self.plan(pieces)
        reach = int(pieces.ends.max(initial=0))
        if reach > out.numel():
            raise ValueError(f"the pieces reach to element {reach} of the {out.numel()} of out")
        self._run(copies, field, out)
        return out

    def plan(self, pieces: Pieces) -> Copies:
        """What has to be copied from where to fill `pieces`, whatever the field. Raises CheckpointError as `fill`."""
        if self._plan is None or self._plan[0] is not pieces:
            self._plan = (pieces, self._copies(pieces))
        return self._plan[1]

    def _number(self, name: str) -> int:
        if name not in self._numbers:
            raise CheckpointError(f"{self._folder} has no tensor {name}")
        return self._numbers[name]

    def _read(self, pieces: Pieces, field: str) -> Tensor:
        copies = self._copies(pieces)  # finds holes before memory of a claimed size is taken
        out = torch.empty(int(pieces.ends.max(initial=0)))
        self._run(copies, field, out)
        return out

    def _join_boxes(self, members: list[Ints]) -> Boxes:
        parts = []
        for file, numbers, base in zip(self.files, members, self._bases, strict=True):
            boxes = _renumbered(file.pieces.boxes, numbers, len(self._shapes))
            parts.append((boxes.tensor, boxes.offset, boxes.extent, boxes.start + base))
        return Boxes(*(np.concatenate(part, axis=-1) for part in zip(*parts, strict=True)))

    def _refuse_overlaps(self) -> None:
        if self._atlas.is_disjoint:
            return
        for mine, other in self._atlas.meeting(self._boxes):
            for i, j in zip(mine[mine != other], other[mine != other], strict=True):
                name = self.names()[self._boxes.tensor[i]]
                files = sorted({str(self.files[k].data) for k in self._owner(self._boxes.start[[i, j]])})
                raise CheckpointError(f"two ranges of {name} overlap in {' and '.join(files)}: the index is damaged")

    def _owner(self, positions: Ints) -> Ints:
        return np.searchsorted(self._bases, positions, side="right") - 1

    def _copies(self, pieces: Pieces) -> Copies:
        wanted = _renumbered(pieces.boxes, self._matched(pieces), len(self._shapes))
        theirs, mine = (np.concatenate(side) for side in zip(*self._atlas.meeting(wanted), _NO_PAIRS, strict=True))
        source, target = self._boxes.take(mine), wanted.take(theirs)
        covered = np.zeros_like(wanted.numel)
        np.add.at(covered, theirs, overlap(source, target)[1].prod(axis=0))
        for i in np.flatnonzero(covered != wanted.numel).tolist():
            tensor = pieces.boxes.tensor[i]
            shape = shape_of(pieces.shapes, tensor)
            raise CheckpointError(
                f"{self._folder} has a hole: of {pieces.names[tensor]} {list(shape)} the {wanted.numel[i]} elements "
                f"from {wanted.offset[: len(shape), i].tolist()} on are needed, {covered[i]} of them are there"
            )
        return copies_between(source, target)

    def _matched(self, pieces: Pieces) -> Ints:
        """[T]: the numbers of the pieces' tensors. Raises CheckpointError when one is absent, or has another shape."""
        try:
            numbers = _look_up(self._numbers, pieces.names)
        except KeyError as error:
            raise CheckpointError(f"{self._folder} has no tensor {error.args[0]}") from None
        dimensions = max(len(self._shapes), len(pieces.shapes))
        here, there = deepened(pieces.shapes, dimensions), deepened(self._shapes.take(numbers, 1), dimensions)
        for i in np.flatnonzero((here != there).any(axis=0)).tolist():
            raise CheckpointError(
                f"{pieces.names[i]} is {list(shape_of(there, i))} in {self._folder}, but {list(shape_of(here, i))} here"
            )
        return numbers

    def _run(self, copies: Copies, field: str, out: Tensor) -> None:
        owner = self._owner(copies.source)
        self._sweeper.carry_out(copies, owner, 4 * (copies.source - self._bases[owner]), field, out.detach().numpy())


def _needed(indices: list[FileRecord], pieces: Pieces) -> list[FileRecord]:
    """Those that may tell of the pieces; all of them, where asking costs more than opening."""
    if len(indices) <= _FEW_INDICES:
        return indices
    wanted = Wanted(pieces)
    return [record for record in indices if wanted.meets(record.spans)] or indices[:1]


def _numbers(files: Sequence[IndexedFile]) -> dict[str, int]:
    """Numbers of all tensors by name."""
    numbers: dict[str, int] = {}
    for file in files:
        new = [name for name in file.pieces.names if name not in numbers]
        numbers.update(zip(new, range(len(numbers), len(numbers) + len(new)), strict=True))
    return numbers


def _look_up(numbers: Mapping[str, int], names: list[str]) -> Ints:
    if names == list(numbers):  # one file, or a rank of the layout that wrote it: comparing is cheaper
        return np.arange(len(names))
    return np.fromiter(map(numbers.__getitem__, names), np.int64, len(names))


def _join_shapes(files: Sequence[IndexedFile], members: list[Ints], tensors: int) -> Ints:
    """Shapes [N, T] of all tensors, of which each file has those numbered so."""
    dimensions = max(len(file.pieces.shapes) for file in files)
    shapes = np.full((dimensions, tensors), -1, np.int64)
    for file, numbers in zip(files, members, strict=True):
        mine, known = deepened(file.pieces.shapes, dimensions), shapes.take(numbers, 1)
        for i in np.flatnonzero(((known != mine) & (known >= 0)).any(axis=0)).tolist():
            raise CheckpointError(
                f"{file.pieces.names[i]} is {list(shape_of(mine, i))} in {file.data}, but "
                f"{list(shape_of(known, i))} in another file"
            )
        shapes[:, numbers] = mine
    if np.maximum(shapes, 1).prod(axis=0).sum(dtype=np.float64) > MAX_ELEMENTS:
        raise CheckpointError(f"{files[0].data.parent} claims tensors of an impossible total size")
    return shapes


def _renumbered(boxes: Boxes, numbers: Ints, dimensions: int) -> Boxes:
    """Boxes of tensors that are numbered otherwise and have at most so many dimensions."""
    offset, extent = boxes.offset[:dimensions], boxes.extent[:dimensions]
    return Boxes(numbers[boxes.tensor], deepened(offset, dimensions), deepened(extent, dimensions, 1), boxes.start)
