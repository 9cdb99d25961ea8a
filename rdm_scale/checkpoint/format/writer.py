"""Writing of a rank's slices: one file of tensors and its index."""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from rdm_scale.checkpoint.format.coverage import spans_of
from rdm_scale.checkpoint.format.index import (
    BLOCK_BYTES,
    DATA,
    INDEX,
    FileRecord,
    digest,
    encode_index,
)
from rdm_scale.checkpoint.format.slices import Pieces
from rdm_scale.errors import CheckpointError
from rdm_scale.storage.location import Location

_ALIGNMENT = 64  # of fields, in bytes: tensors in memory have it, and copies between unlike alignments take longer


def write_tensors(folder: Location, rank: int, pieces: Pieces, fields: Mapping[str, Tensor]) -> list[FileRecord]:
    """Writes a rank's share: the pieces' elements of every field, streamed without a copy of the whole.

    Args:
        pieces: what lies where in the flat tensors; elements that no piece covers (padding) are left out.
        fields: flat fp32 CPU tensors of one length, such as weights, exp_avg, exp_avg_sq and ema.

    Returns:
        Records of the two files, for the commit.

    Raises:
        CheckpointError: the files cannot be written; says where, why and how many bytes they need.
    """
    length, elements = int(pieces.ends.max(initial=0)), int(pieces.boxes.numel.sum())
    for name, flat in fields.items():
        if flat.dtype != torch.float32 or flat.ndim != 1 or flat.device.type != "cpu" or flat.numel() < length:
            raise ValueError(f"{name} must be a flat fp32 CPU tensor of at least {length} elements")
    header = _safetensors_header(list(fields), elements)
    stem, total = f"rank_{rank:05d}", len(header) + len(fields) * elements * 4
    data, index = folder / (stem + DATA), folder / (stem + INDEX)
    try:
        folder.make_dir()
        with data.open("wb") as file:
            file.write(header)
            blocks, runs = _BlockWriter(file), _runs(pieces)
            for flat in fields.values():
                values = flat.detach().contiguous().numpy()
                for begin, end in runs:
                    blocks.write(values[begin:end].view(np.uint8).data)
                blocks.end()
            if data.is_local:
                file.flush()
                os.fsync(file.fileno())
        digests = [xxhash.xxh3_64_intdigest(header), *blocks.digests]
        content = encode_index(pieces, list(fields), len(header), digests)
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
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _runs(pieces: Pieces) -> list[tuple[int, int]]:
    """Longest ranges of the flat buffer that the pieces cover one after the other."""
    begins, ends = pieces.boxes.start, pieces.ends
    gaps = begins[1:] != ends[:-1]
    first, last = np.append(True, gaps)[: len(begins)], np.append(gaps, True)[: len(begins)]
    return list(zip(begins[first].tolist(), ends[last].tolist(), strict=True))


class _BlockWriter:
    """Passes bytes on to a file, and takes the checksum of every block."""

    def __init__(self, file: Any) -> None:
        self.digests: list[int] = []
        self._file = file
        self._hash, self._room = xxhash.xxh3_64(), BLOCK_BYTES

    def write(self, data: memoryview) -> None:
        while data:
            part, data = data[: self._room], data[self._room :]
            self._hash.update(part)
            self._file.write(part)
            self._room -= len(part)
            if not self._room:
                self.end()

    def end(self) -> None:
        """Ends a block that is not full yet, if there is one."""
        if self._room < BLOCK_BYTES:
            self.digests.append(self._hash.intdigest())
            self._hash, self._room = xxhash.xxh3_64(), BLOCK_BYTES
