"""The index of a rank's file of tensors: what lies where in it, with the checksums to prove it.

`rank_00000.index.safetensors` is plain safetensors too. Its arrays are

    names   U8 [...]          of T tensors, UTF-8, a line each
    shapes  I64 [N, T]        0 where a tensor has fewer than N dimensions
    pieces  I64 [1 + 2 N, P]  as they lie: number of the tensor, N offsets, N extents (0 and 1 where it has fewer)
    blocks  U64 [...]         xxh3_64 of the file's header, then of each BLOCK_BYTES of each field

and its metadata `rdm_scale` are JSON: the fields of the file, and where the first one begins.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import safetensors.numpy
import xxhash
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from rdm_scale.checkpoint.format.coverage import Span
from rdm_scale.checkpoint.format.overlap import Boxes, Ints
from rdm_scale.checkpoint.format.slices import Pieces
from rdm_scale.errors import CheckpointError
from rdm_scale.storage.location import Location

BLOCK_BYTES = 4 * 2**20  # what one checksum covers
DATA, INDEX = ".safetensors", ".index.safetensors"
MAX_ELEMENTS = 2**60
_MAX_BYTES = 2**30  # an index from elsewhere is untrusted; this one would describe tens of millions of pieces
_MAX_DIMENSIONS = 64
_ARRAYS = {"names": ("U8", 1, np.uint8), "shapes": ("I64", 2, np.int64), "pieces": ("I64", 2, np.int64),
           "blocks": ("U64", 1, np.uint64)}  # fmt: skip
_METADATA = "rdm_scale"

_Count = Annotated[int, Field(ge=0, lt=MAX_ELEMENTS)]


class FileRecord(BaseModel):
    """A file of a checkpoint; `xxh3` is None where an index holds the checksums of its blocks. Of an index, `spans`
    says what it may tell of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    bytes: _Count
    xxh3: str | None = Field(None, pattern=r"^[0-9a-f]{16}$")
    spans: tuple[Span, ...] = ()


class _Header(BaseModel):
    """What an index says beside its arrays."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal["rdm_scale.tensors"] = "rdm_scale.tensors"
    version: Literal[2] = 2
    fields: list[Annotated[str, Field(pattern=r"^\w+$")]] = Field(
        min_length=1, description="in the order in which they lie"
    )
    header_bytes: _Count = Field(description="where the first field begins")


@dataclass(frozen=True)
class IndexedFile:
    """A rank's file as its index describes it."""

    data: Location
    bytes: int
    fields: list[str]
    header_bytes: int  # where the first field begins
    elements: int  # of each field
    pieces: Pieces  # of each field, which they make up
    digests: NDArray[np.uint64]  # of each block; the first block is the header

    def first_block(self, field: str) -> int:
        """Raises CheckpointError: there is no such field."""
        if field not in self.fields:
            raise CheckpointError(f"{self.data} has no {field}; it has {', '.join(self.fields)}")
        return 1 + self.fields.index(field) * blocks_in(self.elements)

    def block_range(self, number: int) -> tuple[int, int]:
        """Where a block begins and ends, in bytes."""
        if number == 0:
            return 0, self.header_bytes
        field, block = divmod(number - 1, blocks_in(self.elements))
        begin, size = self.header_bytes + 4 * self.elements * field, 4 * self.elements
        return begin + block * BLOCK_BYTES, begin + min((block + 1) * BLOCK_BYTES, size)


def blocks_in(elements: int) -> int:
    """Of a field."""
    return -(-4 * elements // BLOCK_BYTES)


def digest(content: Any) -> str:
    return xxhash.xxh3_64_hexdigest(content)


def encode_index(pieces: Pieces, fields: list[str], header_bytes: int, digests: Sequence[int]) -> bytes:
    """The index of a file in which the pieces lie one after the other, whatever their starts."""
    names = "\n".join(pieces.names)
    if names.count("\n") != max(len(pieces.names) - 1, 0):
        raise ValueError("names of tensors must be of one line")
    boxes = pieces.boxes
    arrays = {
        "names": np.frombuffer(names.encode(), np.uint8),
        "shapes": pieces.shapes,
        "pieces": np.concatenate([boxes.tensor[None], boxes.offset, boxes.extent]),
        "blocks": np.array(digests, np.uint64),
    }
    header = _Header(fields=fields, header_bytes=header_bytes)
    return safetensors.numpy.save(arrays, {_METADATA: header.model_dump_json()})


def read_index(folder: Location, record: FileRecord, sizes: Mapping[str, int]) -> IndexedFile:
    """Raises CheckpointError unless the index is whole and possible: nothing in it is taken on trust."""
    where = folder / record.name
    data = record.name.removesuffix(INDEX) + DATA
    if record.bytes > _MAX_BYTES:
        raise CheckpointError(f"{where} is larger than an index can be ({record.bytes:,} bytes)")
    try:
        content = where.read_range(0, record.bytes + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {where}: {error.strerror or error}") from error
    if len(content) != record.bytes or digest(content) != record.xxh3:
        raise CheckpointError(f"{where} is damaged: it is not what was written; use another checkpoint")
    if data not in sizes:
        raise CheckpointError(f"{where} is not a valid index: its data file is no part of the checkpoint")
    try:
        return _decode(content, folder / data, sizes[data])
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "it"
        raise CheckpointError(f"{where} is not a valid index: {place}: {first['msg']}") from None
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{where} is not a valid index: {error}") from None


def _decode(content: bytes, data: Location, size: int) -> IndexedFile:
    """Raises SafetensorError, ValueError (a ValidationError is one): says what is impossible about an index whose data
    file has `size` bytes."""
    arrays = _arrays(content)
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__") or {}
    header = _Header.model_validate_json(metadata.get(_METADATA, ""))
    shapes, table, digests = arrays["shapes"], arrays["pieces"], arrays["blocks"]
    text = arrays["names"].tobytes().decode()
    names = text.split("\n") if text else []
    if len(set(header.fields)) != len(header.fields) or len(set(names)) != len(names):
        raise ValueError("a field or tensor occurs twice")
    _check_shapes(shapes, len(names))
    boxes = _checked_boxes(table, shapes)
    elements, count = int(boxes.numel.sum()), len(header.fields)
    if header.header_bytes % 8 or header.header_bytes + 4 * count * elements != size:
        raise ValueError(f"{count} fields of {elements} elements do not make a file of {size} bytes")
    if len(digests) != 1 + count * blocks_in(elements):
        raise ValueError("the number of checksums does not fit the file")
    pieces = Pieces(names, shapes, boxes)
    return IndexedFile(data, size, header.fields, header.header_bytes, elements, pieces, digests)


def _arrays(content: bytes) -> dict[str, NDArray]:
    found = {}
    for name, array in safetensors.deserialize(content):  # takes no more memory than there is content
        dtype, dimensions, kind = _ARRAYS.get(name, ("", 0, np.uint8))
        if (array["dtype"], len(array["shape"])) != (dtype, dimensions):
            raise ValueError(f"{name} is no array of an index, or of another type")
        found[name] = np.frombuffer(array["data"], kind).reshape(array["shape"])
    if found.keys() != _ARRAYS.keys():
        raise ValueError(f"it lacks {', '.join(sorted(_ARRAYS.keys() - found.keys()))}")
    return found


def _check_shapes(shapes: Ints, tensors: int) -> None:
    if not 1 <= len(shapes) <= _MAX_DIMENSIONS or shapes.shape[1] != tensors:
        raise ValueError(f"the dimensions are not those of {tensors} tensors")
    with np.errstate(over="ignore"):
        sizes = np.maximum(shapes, 1).prod(axis=0, dtype=np.float64)
    if (shapes < 0).any() or ((shapes[:-1] == 0) & (shapes[1:] != 0)).any() or (sizes > MAX_ELEMENTS).any():
        raise ValueError("a tensor has an impossible shape")


def _checked_boxes(table: Ints, shapes: Ints) -> Boxes:
    """The pieces of the table, once it is seen that all lie in their tensors."""
    dimensions, tensors = shapes.shape
    if len(table) != 1 + 2 * dimensions:
        raise ValueError("the pieces have other dimensions than the tensors")
    tensor, offset, extent = table[0], table[1 : 1 + dimensions], table[1 + dimensions :]
    if tensor.min(initial=0) < 0 or tensor.max(initial=-1) >= tensors:
        raise ValueError("a piece is of no tensor")
    whole = np.maximum(shapes, 1).take(tensor, axis=1)
    if (offset < 0).any() or (extent < 1).any() or (extent > whole).any() or (offset > whole - extent).any():
        raise ValueError("a piece reaches beyond its tensor")
    numel = extent.prod(axis=0)  # at most those of the tensor: no overflow
    if numel.sum(dtype=np.float64) > MAX_ELEMENTS:
        raise ValueError("the pieces have an impossible number of elements")
    return Boxes(tensor, offset, extent, np.cumsum(numel) - numel)
