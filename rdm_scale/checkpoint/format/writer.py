"""Writer of a rank's slices: one data file in safetensors format and its index."""

import json
import os
from collections.abc import Mapping
from typing import IO, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from rdm_scale.checkpoint.format.coverage import coverage_bounds
from rdm_scale.checkpoint.format.finite import refuse_non_finite_slices
from rdm_scale.checkpoint.format.index import BLOCK_BYTES, DATA, INDEX, FileRecord, digest, encode_index
from rdm_scale.checkpoint.format.slices import SliceTable
from rdm_scale.errors import CheckpointError
from rdm_scale.storage.location import Location

_ADVICE = (
    "Go back to an earlier checkpoint, with a lower optimizer.lr or optimizer.grad_clip, a longer warm-up, or "
    "train.precision=fp32"
)
_ALIGNMENT = 64  # bytes, as of tensors in memory: copies between different alignments take longer


def write_tensors(
    folder: Location, rank: int, table: SliceTable, entries: Mapping[str, Tensor], block_bytes: int = BLOCK_BYTES
) -> list[FileRecord]:
    """Write a rank's slices of every state entry, streamed without a copy.

    Args:
        folder: the checkpoint's folder.
        rank: number in the file names.
        table: the slices in the flat tensors; elements that no slice covers (padding) are not written.
        entries: flat fp32 CPU tensors of one length, such as weights, exp_avg, exp_avg_sq and ema.
        block_bytes: bytes per checksum.

    Returns:
        Records of the two files, for the commit.

    Raises:
        CheckpointError: the files cannot be written; says where, why and how many bytes they need.
        NonFiniteError: a tensor holds NaN or infinity; before its entry is written.
    """
    length, elements = table.buffer_elements, int(table.slices.numel.sum())
    for name, flat in entries.items():
        if flat.dtype != torch.float32 or flat.ndim != 1 or flat.device.type != "cpu" or flat.numel() < length:
            raise ValueError(f"{name} must be a flat fp32 CPU tensor of at least {length} elements")
    header = _safetensors_header(list(entries), elements)
    stem, total = f"rank_{rank:05d}", len(header) + len(entries) * elements * 4
    data, index = folder / (stem + DATA), folder / (stem + INDEX)
    try:
        folder.make_dir()
        with data.open("wb") as file:
            file.write(header)
            blocks, ranges = _BlockWriter(file, block_bytes), _contiguous_ranges(table)
            for entry, flat in entries.items():
                refuse_non_finite_slices(table, entry, flat, f"{folder} is not saved", _ADVICE)
                values = flat.detach().contiguous().numpy()
                for begin, end in ranges:
                    blocks.write(values[begin:end].view(np.uint8).data)
                blocks.end()
            if data.is_local:
                file.flush()
                os.fsync(file.fileno())
        digests = [xxhash.xxh3_64_intdigest(header), *blocks.digests]
        content = encode_index(table, list(entries), len(header), digests)
        index.write(content)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {data}: {error.strerror or error}; it needs {total:,} bytes. Make room or set "
            "checkpoint.dir elsewhere; earlier checkpoints are untouched"
        ) from error
    return [
        FileRecord(name=data.name, bytes=total),
        FileRecord(name=index.name, bytes=len(content), xxh3=digest(content), spans=coverage_bounds(table)),
    ]


def _safetensors_header(entries: list[str], elements: int) -> bytes:
    size = 4 * elements
    tensors = {
        name: {"dtype": "F32", "shape": [elements], "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(entries)
    }
    text = json.dumps(tensors).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


class _BufferRange(NamedTuple):
    begin: int
    end: int


def _contiguous_ranges(table: SliceTable) -> list[_BufferRange]:
    """Longest ranges of the flat buffer that consecutive slices cover without a gap."""
    begins, ends = table.slices.start, table.ends
    gaps = begins[1:] != ends[:-1]
    first, last = np.append(True, gaps)[: len(begins)], np.append(gaps, True)[: len(begins)]
    return [_BufferRange(*bounds) for bounds in zip(begins[first].tolist(), ends[last].tolist(), strict=True)]


class _BlockWriter:
    """Writer to a file that computes the checksum of every block."""

    def __init__(self, file: IO[bytes], block_bytes: int) -> None:
        self.digests: list[int] = []
        self._file, self._block_bytes = file, block_bytes
        self._hash, self._room = xxhash.xxh3_64(), block_bytes

    def write(self, data: memoryview) -> None:
        while data:
            part, data = data[: self._room], data[self._room :]
            self._hash.update(part)
            self._file.write(part)
            self._room -= len(part)
            if not self._room:
                self.end()

    def end(self) -> None:
        """End the current block if it is only partially filled."""
        if self._room < self._block_bytes:
            self.digests.append(self._hash.intdigest())
            self._hash, self._room = xxhash.xxh3_64(), self._block_bytes
