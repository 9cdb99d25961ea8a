"""The index of a rank's tensor file: names, shapes, slices and checksums.

`rank_00000.index.safetensors` is a plain safetensors file. Its arrays are

    names   U8 [...]          names of T tensors, UTF-8, one per line
    shapes  I64 [N, T]        0 where a tensor has fewer than N dimensions
    pieces  I64 [1 + 2 N, P]  slices in storage order: tensor number, N offsets, N extents (0 and 1 where it has fewer)
    blocks  U64 [...]         xxh3_64 of the file's header, then of each BLOCK_BYTES of each state entry

and its metadata `rdm_scale` are JSON: the state entries of the file (`fields`) and the position of the first one.

Shapes: N dimensions, T tensors, P slices.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import safetensors.numpy
import xxhash
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from rdm_scale.checkpoint.format.coverage import CoverageBounds
from rdm_scale.checkpoint.format.slices import Ints, Slices, SliceTable
from rdm_scale.errors import CheckpointError
from rdm_scale.storage.location import Location

BLOCK_BYTES = 4 * 2**20  # bytes per checksum; part of the format
DATA, INDEX = ".safetensors", ".index.safetensors"
MAX_ELEMENTS = 2**60
_MAX_BYTES = 2**30  # indices are untrusted; one of this size describes tens of millions of slices
_MAX_DIMENSIONS = 64
_METADATA = "rdm_scale"

_Count = Annotated[int, Field(ge=0, lt=MAX_ELEMENTS)]


class _ArraySpec(NamedTuple):
    dtype: str  # in safetensors
    dimensions: int
    numpy_dtype: type[np.generic]


_ARRAYS = {
    "names": _ArraySpec("U8", 1, np.uint8),
    "shapes": _ArraySpec("I64", 2, np.int64),
    "pieces": _ArraySpec("I64", 2, np.int64),
    "blocks": _ArraySpec("U64", 1, np.uint64),
}
_UNKNOWN = _ArraySpec("", 0, np.uint8)


class FileRecord(BaseModel):
    """A file of a checkpoint, as listed in `commit.json`.

    `xxh3` is None for a data file, whose index holds the checksums of its blocks. `spans` are the coverage bounds of
    the data file that an index describes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    bytes: _Count
    xxh3: str | None = Field(None, pattern=r"^[0-9a-f]{16}$")
    spans: tuple[CoverageBounds, ...] = ()


class _IndexHeader(BaseModel):
    """Metadata of an index."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal["rdm_scale.tensors"] = "rdm_scale.tensors"
    version: Literal[2] = 2
    fields: list[Annotated[str, Field(pattern=r"^\w+$")]] = Field(
        min_length=1, description="state entries in storage order"
    )
    header_bytes: _Count = Field(description="position of the first state entry")


@dataclass(frozen=True)
class IndexedFile:
    """A rank's data file as its index describes it."""

    data: Location
    bytes: int
    entries: list[str]  # state entries in storage order
    header_bytes: int  # position of the first state entry
    elements: int  # of each state entry
    table: SliceTable  # slices of each state entry, without gaps
    digests: NDArray[np.uint64]  # of each block; the first block is the header
    block_bytes: int = BLOCK_BYTES

    def first_block(self, entry: str) -> int:
        """Number of the first block of a state entry. Raises CheckpointError if the file does not have the entry."""
        if entry not in self.entries:
            raise CheckpointError(f"{self.data} has no {entry}; it has {', '.join(self.entries)}")
        return 1 + self.entries.index(entry) * blocks_in(self.elements, self.block_bytes)

    def block_range(self, number: int) -> tuple[int, int]:
        """Byte positions of the start and the end of a block."""
        if number == 0:
            return 0, self.header_bytes
        entry, block = divmod(number - 1, blocks_in(self.elements, self.block_bytes))
        begin, size = self.header_bytes + 4 * self.elements * entry, 4 * self.elements
        return begin + block * self.block_bytes, begin + min((block + 1) * self.block_bytes, size)


def blocks_in(elements: int, block_bytes: int = BLOCK_BYTES) -> int:
    """Number of blocks in a state entry of `elements` elements."""
    return -(-4 * elements // block_bytes)


def digest(content: Any) -> str:
    """xxh3_64 in hexadecimal."""
    return xxhash.xxh3_64_hexdigest(content)


def encode_index(table: SliceTable, entries: list[str], header_bytes: int, digests: Sequence[int]) -> bytes:
    """Encode the index of a file in which the slices are stored one after the other; their `start` is ignored."""
    names = "\n".join(table.names)
    if names.count("\n") != max(len(table.names) - 1, 0):
        raise ValueError("names of tensors must not contain line breaks")
    slices = table.slices
    arrays = {
        "names": np.frombuffer(names.encode(), np.uint8),
        "shapes": table.shapes,
        "pieces": np.concatenate([slices.tensor[None], slices.offset, slices.extent]),
        "blocks": np.array(digests, np.uint64),
    }
    header = _IndexHeader(fields=entries, header_bytes=header_bytes)
    return safetensors.numpy.save(arrays, {_METADATA: header.model_dump_json()})


def read_index(
    folder: Location, record: FileRecord, sizes: Mapping[str, int], block_bytes: int = BLOCK_BYTES
) -> IndexedFile:
    """Read and validate an index. Nothing in it is trusted.

    Args:
        folder: the checkpoint's folder.
        record: the index's record in `commit.json`.
        sizes: bytes of each file of the checkpoint.
        block_bytes: bytes per checksum.

    Raises:
        CheckpointError: the index is missing, damaged or impossible.
    """
    where = folder / record.name
    data = record.name.removesuffix(INDEX) + DATA
    if record.bytes > _MAX_BYTES:
        raise CheckpointError(
            f"{where} has {record.bytes:,} bytes, and an index has at most {_MAX_BYTES:,}: use another checkpoint"
        )
    try:
        content = where.read_range(0, record.bytes + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {where}: {error.strerror or error}") from error
    if len(content) != record.bytes or digest(content) != record.xxh3:
        raise CheckpointError(f"{where} is damaged: its checksum differs; use another checkpoint")
    if data not in sizes:
        raise CheckpointError(f"{where} is not a valid index: its data file is not part of the checkpoint")
    try:
        return _decode(content, folder / data, sizes[data], block_bytes)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "metadata"
        raise CheckpointError(f"{where} is not a valid index: {place}: {first['msg']}") from None
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{where} is not a valid index: {error}") from None


def _decode(content: bytes, data: Location, size: int, block_bytes: int) -> IndexedFile:
    """Decode the index of a data file of `size` bytes.

    Raises:
        SafetensorError, ValueError, ValidationError: the index is invalid; says why.
    """
    arrays = _decode_arrays(content)
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__") or {}
    header = _IndexHeader.model_validate_json(metadata.get(_METADATA, ""))
    shapes, digests = arrays["shapes"], arrays["blocks"]
    text = arrays["names"].tobytes().decode()
    names = text.split("\n") if text else []
    if len(set(header.fields)) != len(header.fields) or len(set(names)) != len(names):
        raise ValueError("a state entry or tensor occurs twice")
    _check_shapes(shapes, len(names))
    slices = _decode_slices(arrays["pieces"], shapes)
    elements, count = int(slices.numel.sum()), len(header.fields)
    if header.header_bytes % 8 or header.header_bytes + 4 * count * elements != size:
        raise ValueError(f"{count} state entries of {elements} elements do not make a file of {size} bytes")
    if len(digests) != 1 + count * blocks_in(elements, block_bytes):
        raise ValueError("the number of checksums does not fit the file")
    table = SliceTable(names, shapes, slices)
    return IndexedFile(data, size, header.fields, header.header_bytes, elements, table, digests, block_bytes)


def _decode_arrays(content: bytes) -> dict[str, NDArray]:
    found = {}
    for name, array in safetensors.deserialize(content):  # takes no more memory than the content
        expected = _ARRAYS.get(name, _UNKNOWN)
        if (array["dtype"], len(array["shape"])) != (expected.dtype, expected.dimensions):
            raise ValueError(f"{name} is not an array of an index, or has another type")
        found[name] = np.frombuffer(array["data"], expected.numpy_dtype).reshape(array["shape"])
    if found.keys() != _ARRAYS.keys():
        raise ValueError(f"it lacks {', '.join(sorted(_ARRAYS.keys() - found.keys()))}")
    return found


def _check_shapes(shapes: Ints, tensors: int) -> None:
    if not 1 <= len(shapes) <= _MAX_DIMENSIONS or shapes.shape[1] != tensors:
        raise ValueError(f"the array of shapes has impossible dimensions for {tensors} tensors")
    with np.errstate(over="ignore"):
        sizes = np.maximum(shapes, 1).prod(axis=0, dtype=np.float64)
    if (shapes < 0).any() or ((shapes[:-1] == 0) & (shapes[1:] != 0)).any() or (sizes > MAX_ELEMENTS).any():
        raise ValueError("a tensor has an impossible shape")


def _decode_slices(rows: Ints, shapes: Ints) -> Slices:
    """Decode the array `pieces` after checking that all slices are within their tensors."""
    dimensions, tensors = shapes.shape
    if len(rows) != 1 + 2 * dimensions:
        raise ValueError("the slices have other dimensions than the tensors")
    tensor, offset, extent = rows[0], rows[1 : 1 + dimensions], rows[1 + dimensions :]
    if tensor.min(initial=0) < 0 or tensor.max(initial=-1) >= tensors:
        raise ValueError("a slice refers to a tensor that does not exist")
    logical = np.maximum(shapes, 1).take(tensor, axis=1)
    if (offset < 0).any() or (extent < 1).any() or (extent > logical).any() or (offset > logical - extent).any():
        raise ValueError("a slice reaches beyond its tensor")
    numel = extent.prod(axis=0)  # at most the tensor's elements: no overflow
    if numel.sum(dtype=np.float64) > MAX_ELEMENTS:
        raise ValueError("the slices have an impossible number of elements")
    return Slices(tensor, offset, extent, np.cumsum(numel) - numel)
