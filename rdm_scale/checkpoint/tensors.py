"""Tensors of a checkpoint: every rank writes its ranges as they lie, any rank reads whatever ranges it needs.

A rank's file `rank_00000.safetensors` holds each field (weights, moments, averages) as one flat fp32 tensor; the index
`rank_00000.json` beside it says which rectangle of which logical tensor lies where, and holds a checksum of every
block of the file, so that any range is verified by reading the blocks that it touches.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from rdm_scale.checkpoint.index import (
    BLOCK_BYTES,
    DATA,
    INDEX,
    MAX_ELEMENTS,
    FileRecord,
    IndexedFile,
    digest,
    index_of,
    read_index,
)
from rdm_scale.checkpoint.reads import carry_out
from rdm_scale.checkpoint.rectangles import Atlas, Boxes, Copies, Ints, Piece, Rectangle, copies_between
from rdm_scale.checkpoint.spans import Wanted, spans_of
from rdm_scale.data.storage import Location
from rdm_scale.errors import CheckpointError

_FEW_INDICES = 32


def write_tensors(
    folder: Location, rank: int, pieces: Sequence[Piece], fields: Mapping[str, Tensor]
) -> list[FileRecord]:
    """Writes a rank's share: the pieces' elements of every field, streamed without a copy of the whole.

    Args:
        pieces: what lies where in the flat tensors; elements that no piece covers (padding) are left out.
        fields: flat fp32 CPU tensors of one length, such as weights, exp_avg, exp_avg_sq and ema.

    Returns:
        Records of the two files, for the commit.

    Raises:
        CheckpointError: the files cannot be written; says where, why and how many bytes they need.
    """
    length = max((piece.start + piece.rectangle.numel for piece in pieces), default=0)
    for name, flat in fields.items():
        if flat.dtype != torch.float32 or flat.ndim != 1 or flat.device.type != "cpu" or flat.numel() < length:
            raise ValueError(f"{name} must be a flat fp32 CPU tensor of at least {length} elements")
    elements = sum(piece.rectangle.numel for piece in pieces)
    header = _safetensors_header(list(fields), elements)
    stem, total = f"rank_{rank:05d}", len(header) + len(fields) * elements * 4
    data, index = folder / (stem + DATA), folder / (stem + INDEX)
    try:
        folder.make_dir()
        with data.open("wb") as file:
            blocks = _BlockWriter(file)
            blocks.write(memoryview(header))
            runs = list(_runs(pieces))
            for flat in fields.values():
                values = flat.detach().contiguous().numpy()
                for begin, end in runs:
                    blocks.write(values[begin:end].view(np.uint8).data)
            digests = blocks.finish()
            if data.is_local:
                file.flush()
                os.fsync(file.fileno())
        content = index_of(pieces, list(fields), len(header), elements, digests).model_dump_json().encode()
        index.write(content)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {data}: {error.strerror or error}; it needs {total:,} bytes. Make room or set "
            "checkpoint.dir elsewhere; earlier checkpoints are untouched"
        ) from error
    return [
        FileRecord(name=data.name, bytes=total),
        FileRecord(name=index.name, bytes=len(content), xxh3=digest(content), spans=spans_of(pieces)),
    ]


def _safetensors_header(fields: list[str], elements: int) -> bytes:
    size = 4 * elements
    tensors = {
        name: {"dtype": "F32", "shape": [elements], "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(fields)
    }
    text = json.dumps(tensors).encode()
    text += b" " * (-len(text) % 8)  # readers map the file: fields must be aligned
    return len(text).to_bytes(8, "little") + text


def _runs(pieces: Sequence[Piece]) -> Iterator[tuple[int, int]]:
    """Longest ranges of the flat buffer that the pieces cover one after the other."""
    begin = end = 0
    for piece in pieces:
        if piece.start != end:
            if end > begin:
                yield begin, end
            begin = piece.start
        end = piece.start + piece.rectangle.numel
    if end > begin:
        yield begin, end


class _BlockWriter:
    """Passes bytes on to a file, and takes the checksum of every block."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._digests: list[str] = []
        self._hash, self._room = xxhash.xxh3_64(), BLOCK_BYTES

    def write(self, data: memoryview) -> None:
        while data:
            part, data = data[: self._room], data[self._room :]
            self._hash.update(part)
            self._file.write(part)
            self._room -= len(part)
            if not self._room:
                self._next()

    def finish(self) -> list[str]:
        if self._room < BLOCK_BYTES:
            self._next()
        return self._digests

    def _next(self) -> None:
        self._digests.append(self._hash.hexdigest())
        self._hash, self._room = xxhash.xxh3_64(), BLOCK_BYTES


class TensorReader:
    """Reads logical tensors from whatever ranges any number of ranks wrote.

    Args:
        folder: where the files are.
        records: of all the checkpoint's files.
        pieces: what will be read, where that is known: then only the files that may hold some of it are opened.

    Raises:
        CheckpointError: an index is damaged or impossible, or two ranges overlap; names the file or tensor.
    """

    def __init__(self, folder: Location, records: Sequence[FileRecord], pieces: Sequence[Piece] | None = None) -> None:
        sizes = {record.name: record.bytes for record in records}
        indices = [r for r in records if r.name.startswith("rank_") and r.name.endswith(INDEX)]
        if not indices:
            raise CheckpointError(f"{folder} holds no tensors: no index rank_*{INDEX} is part of it")
        if pieces is not None:
            indices = _needed(indices, pieces)
        with ThreadPoolExecutor(16) as pool:
            self.files = list(pool.map(lambda record: read_index(folder, record, sizes), indices))
        self._folder = folder
        self._shapes = _merge_shapes(self.files)
        self._numbers = {name: i for i, name in enumerate(self._shapes)}
        self._dimensions = max(file.table.shape[1] // 2 for file in self.files)
        # Files are laid end to end, one element apart, so that no range reaches from one into the next.
        self._bases = np.cumsum([0, *(file.elements + 1 for file in self.files)])[:-1]
        self._boxes = self._join_boxes()
        shapes = [(*shape, *(1,) * (self._dimensions - len(shape))) for shape in self._shapes.values()]
        self._atlas = Atlas(self._boxes, np.array(shapes, np.int64).reshape(len(shapes), self._dimensions))
        self._refuse_overlaps()
        self._plan: tuple[Sequence[Piece], Copies] | None = None

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._shapes:
            raise CheckpointError(f"{self._folder} has no tensor {name}")
        return self._shapes[name]

    def fields(self) -> list[str]:
        """Those that every file has."""
        return [name for name in self.files[0].fields if all(name in file.fields for file in self.files)]

    def read(self, field: str, name: str, rectangle: Rectangle | None = None) -> Tensor:
        """A logical tensor, or a rectangle of it, in fp32. Raises CheckpointError as `fill` does.

        Whole blocks are read and verified: for many tensors `read_many` and `fill` cost far less.
        """
        shape = self.shape(name)
        box = rectangle or Rectangle((0,) * len(shape), shape)
        return self._read([Piece(name, shape, box, 0)], field)[0]

    def read_many(self, field: str, names: Sequence[str]) -> dict[str, Tensor]:
        """Several whole logical tensors in fp32, which share their memory. Raises CheckpointError as `fill` does."""
        pieces, start = [], 0
        for name in names:
            shape = self.shape(name)
            pieces.append(Piece(name, shape, Rectangle((0,) * len(shape), shape), start))
            start += math.prod(shape)
        return dict(zip(names, self._read(pieces, field), strict=True))

    def fill(self, pieces: Sequence[Piece], field: str, out: Tensor) -> Tensor:
        """Fills a rank's flat buffer; elements that no piece covers stay as they are.

        The plan is kept, so that several fields of the same `pieces` (the same object) cost one.

        Args:
            out: flat, contiguous fp32 CPU tensor.

        Returns:
            `out`.

        Raises:
            CheckpointError: a tensor or field is absent, of another shape, or has a hole; bytes differ from what was
                written (a file and offset are named); a file cannot be read.
        """
        if out.dtype != torch.float32 or out.ndim != 1 or out.device.type != "cpu" or not out.is_contiguous():
            raise ValueError("out must be a flat, contiguous fp32 CPU tensor")
        copies = self.plan(pieces)
        if copies.reach > out.numel():
            raise ValueError(f"the pieces reach to element {copies.reach} of the {out.numel()} of out")
        self._run(copies, field, out)
        return out

    def plan(self, pieces: Sequence[Piece]) -> Copies:
        """What has to be copied from where to fill `pieces`, whatever the field. Raises CheckpointError as `fill`."""
        if self._plan is None or self._plan[0] is not pieces:
            self._plan = (pieces, self._copies(pieces))
        return self._plan[1]

    def _read(self, pieces: list[Piece], field: str) -> list[Tensor]:
        copies = self._copies(pieces)  # finds holes before memory of a claimed size is taken
        extents = [piece.rectangle.extent for piece in pieces]
        sizes = [math.prod(extent) for extent in extents]
        out = torch.empty(sum(sizes))
        self._run(copies, field, out)
        return [part.view(extent) for part, extent in zip(out.split(sizes), extents, strict=True)]

    def _join_boxes(self) -> Boxes:
        tensor, offset, extent, start = [], [], [], []
        for file, base in zip(self.files, self._bases, strict=True):
            n = file.table.shape[1] // 2
            missing = ((0, 0), (0, self._dimensions - n))
            numbers = np.array([self._numbers[name] for name in file.tensors], np.int64)
            tensor.append(numbers[file.table[:, 0]])
            offset.append(np.pad(file.table[:, 1 : 1 + n], missing))
            extent.append(np.pad(file.table[:, 1 + n :], missing, constant_values=1))
            sizes = extent[-1].prod(axis=1)
            start.append(base + np.cumsum(sizes) - sizes)
        return Boxes(*(np.concatenate(parts) for parts in (tensor, offset, extent, start)))

    def _refuse_overlaps(self) -> None:
        for mine, other in self._atlas.meeting(self._boxes):
            for i, j in zip(mine[mine != other], other[mine != other], strict=True):
                name = list(self._shapes)[self._boxes.tensor[i]]
                files = sorted({str(self.files[k].data) for k in self._owner(self._boxes.start[[i, j]])})
                raise CheckpointError(f"two ranges of {name} overlap in {' and '.join(files)}: the index is damaged")

    def _owner(self, positions: Ints) -> Ints:
        return np.searchsorted(self._bases, positions, side="right") - 1

    def _copies(self, pieces: Sequence[Piece]) -> Copies:
        for piece in pieces:
            if self.shape(piece.name) != tuple(piece.shape):
                raise CheckpointError(
                    f"{piece.name} is {list(self.shape(piece.name))} in {self._folder}, but {list(piece.shape)} here"
                )
        wanted = Boxes.of(pieces, self._numbers, self._dimensions)
        pairs = list(self._atlas.meeting(wanted)) or [(np.empty(0, np.int64),) * 2]
        theirs, mine = (np.concatenate(side) for side in zip(*pairs, strict=True))
        source, target = self._boxes.take(mine), wanted.take(theirs)
        covered = np.zeros(len(pieces), np.int64)
        np.add.at(covered, theirs, source.overlap(target).prod(axis=1))
        for i in np.flatnonzero(covered != wanted.numel).tolist():
            piece = pieces[i]
            raise CheckpointError(
                f"{self._folder} has a hole: of {piece.name} {list(piece.shape)} the {piece.rectangle.numel} elements "
                f"from {list(piece.rectangle.offset)} on are needed, {covered[i]} of them are there"
            )
        return copies_between(source, target)

    def _run(self, copies: Copies, field: str, out: Tensor) -> None:
        owner = self._owner(copies.source)
        fields = np.zeros(len(self.files), np.int64)  # where the field begins, in bytes
        for i in np.unique(owner):
            file = self.files[i]
            if field not in file.fields:
                raise CheckpointError(f"{file.data} has no {field}; it has {', '.join(file.fields)}")
            fields[i] = file.header_bytes + file.fields.index(field) * file.elements * 4
        position = fields[owner] + (copies.source - self._bases[owner]) * 4
        carry_out(copies, self.files, owner, position, out.detach().numpy())


def _needed(indices: list[FileRecord], pieces: Sequence[Piece]) -> list[FileRecord]:
    """Those that may tell of the pieces; all of them, where asking costs more than opening."""
    if len(indices) <= _FEW_INDICES:
        return indices
    wanted = Wanted(pieces)
    return [record for record in indices if wanted.meets(record.spans)] or indices[:1]


def _merge_shapes(files: Sequence[IndexedFile]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        for name, shape in file.tensors.items():
            if shapes.setdefault(name, shape) != shape:
                raise CheckpointError(
                    f"{name} is {list(shape)} in {file.data}, but {list(shapes[name])} in another file"
                )
    if sum(map(math.prod, shapes.values())) > MAX_ELEMENTS:
        raise CheckpointError(f"{files[0].data.parent} claims tensors of an impossible total size")
    return shapes
