"""The index of a rank's file of tensors: what lies where in it, with the checksums to prove it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rdm_scale.checkpoint.rectangles import Boxes, Ints, Piece
from rdm_scale.checkpoint.spans import Span
from rdm_scale.data.storage import Location
from rdm_scale.errors import CheckpointError

BLOCK_BYTES = 4 * 2**20  # what one checksum covers
DATA, INDEX = ".safetensors", ".json"
MAX_ELEMENTS = 2**60
_MAX_BYTES = 2**30  # an index from elsewhere is untrusted; this one would describe tens of millions of pieces

_Count = Annotated[int, Field(ge=0, lt=MAX_ELEMENTS)]


class FileRecord(BaseModel):
    """A file of a checkpoint; `xxh3` is None where an index holds the checksums of its blocks. Of an index, `spans`
    says what it may tell of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    bytes: _Count
    xxh3: str | None = Field(None, pattern=r"^[0-9a-f]{16}$")
    spans: tuple[Span, ...] = ()


class Index(BaseModel):
    """What `rank_00000.json` says of the file beside it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal["rdm_scale.tensors"] = "rdm_scale.tensors"
    version: Literal[1] = 1
    fields: list[Annotated[str, Field(pattern=r"^\w+$")]] = Field(description="in the order in which they lie")
    header_bytes: _Count = Field(description="where the first field begins")
    elements: _Count = Field(description="of each field")
    tensors: list[tuple[str, list[Annotated[int, Field(ge=1, lt=MAX_ELEMENTS)]]]] = Field(description="name, shape")
    dimensions: int = Field(ge=1, le=64, description="N: most dimensions of any tensor")
    pieces: list[_Count] = Field(description="of each piece, as they lie: tensor, N offsets, N extents")
    blocks: str = Field(pattern=r"^[0-9a-f]*$", description="xxh3_64 of each BLOCK_BYTES of the whole file")


def digest(content: Any) -> str:
    return xxhash.xxh3_64_hexdigest(content)


def index_of(pieces: Sequence[Piece], fields: list[str], header_bytes: int, elements: int, blocks: list[str]) -> Index:
    shapes = {piece.name: piece.shape for piece in pieces}
    dimensions = max((len(shape) for shape in shapes.values()), default=1) or 1
    boxes = Boxes.of(pieces, {name: i for i, name in enumerate(shapes)}, dimensions)
    table = np.concatenate([boxes.tensor[:, None], boxes.offset, boxes.extent], axis=1)
    return Index(
        fields=fields,
        header_bytes=header_bytes,
        elements=elements,
        tensors=[(name, list(shape)) for name, shape in shapes.items()],
        dimensions=dimensions,
        pieces=table.ravel().tolist(),
        blocks="".join(blocks),
    )


@dataclass(frozen=True)
class IndexedFile:
    """A rank's file as its index describes it."""

    data: Location
    bytes: int
    header_bytes: int
    elements: int
    fields: list[str]
    digests: NDArray[np.uint64]  # of each block
    tensors: dict[str, tuple[int, ...]]
    table: Ints  # [P, 1 + 2 N], as in the index


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
    try:
        index = Index.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "it"
        raise CheckpointError(f"{where} is not a valid index: {place}: {first['msg']}") from None
    problem = _problem(index, sizes.get(data))
    if problem:
        raise CheckpointError(f"{where} is not a valid index: {problem}")
    return IndexedFile(
        data=folder / data,
        bytes=sizes[data],
        header_bytes=index.header_bytes,
        elements=index.elements,
        fields=index.fields,
        digests=np.frombuffer(bytes.fromhex(index.blocks), ">u8").astype(np.uint64),
        tensors={name: tuple(shape) for name, shape in index.tensors},
        table=np.array(index.pieces, np.int64).reshape(-1, 1 + 2 * index.dimensions),
    )


def _problem(index: Index, size: int | None) -> str | None:
    """What is impossible about an index whose data file has `size` bytes."""
    N, T = index.dimensions, len(index.tensors)
    if size is None:
        return "its data file is no part of the checkpoint"
    if index.header_bytes % 8 or index.header_bytes + 4 * index.elements * len(index.fields) != size:
        return f"{len(index.fields)} fields of {index.elements} elements do not make a file of {size} bytes"
    if len(index.blocks) != 16 * math.ceil(size / BLOCK_BYTES):
        return "the number of checksums does not fit the file"
    if len(set(index.fields)) != len(index.fields) or len({name for name, _ in index.tensors}) != T:
        return "a field or tensor occurs twice"
    if any(len(shape) > N or math.prod(shape) > MAX_ELEMENTS for _, shape in index.tensors):
        return "a tensor has an impossible shape"
    if len(index.pieces) % (1 + 2 * N):
        return "the list of pieces is cut off"
    table = np.array(index.pieces, np.int64).reshape(-1, 1 + 2 * N)
    if len(table) and table[:, 0].max() >= T:
        return "a piece is of no tensor"
    shapes = np.array([(*shape, *(1,) * (N - len(shape))) for _, shape in index.tensors], np.int64).reshape(T, N)
    offset, extent, whole = table[:, 1 : 1 + N], table[:, 1 + N :], shapes[table[:, 0]]
    if (extent < 1).any() or (extent > whole).any() or (offset > whole - extent).any():
        return "a piece reaches beyond its tensor"
    if sum(extent.prod(axis=1).tolist()) != index.elements:
        return "the pieces do not add up to the elements of the file"
    return None
