"""Manifest of a data set: files, offsets, counts and checksums of its latent shards.

`manifest.json` is written last, so a folder with a manifest is complete. Offsets and sizes let a reader fetch one
member (a safetensors file that packs many samples) by one range request; counts and checksums reveal missing or
damaged samples.
"""

import hashlib
import math
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rdm_scale.codecs.record import CodecRecord
from rdm_scale.dtypes import STORED_DTYPES
from rdm_scale.errors import DataError
from rdm_scale.moved import moved_names
from rdm_scale.storage.json_files import read_bounded
from rdm_scale.storage.location import Location

MANIFEST_NAME = "manifest.json"
_MAX_BYTES = 2**30  # manifests from others are untrusted; one of this size describes about 10 million members

Shape = tuple[int, int, int, int]  # C, T, H, W


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TarMember(_Record):
    """One safetensors file inside a tar: `samples` samples, `bytes` long, starting at byte `offset` of the tar."""

    name: str
    offset: int = Field(ge=512)
    bytes: int = Field(ge=1)
    samples: int = Field(ge=1)
    xxh3: str = Field(pattern=r"^[0-9a-f]{16}$", description="xxh3_64 of the member's bytes, in hexadecimal")


class TarIndex(_Record):
    """Index of a tar beside the manifest: its members in order, without overlaps."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="file name beside the manifest")
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    members: tuple[TarMember, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_members(self) -> Self:
        end = 0
        for member in self.members:
            if member.offset < end or member.offset + member.bytes > self.bytes:
                raise ValueError(
                    f"{self.name}: member {member.name} overlaps another member or extends beyond the shard"
                )
            end = member.offset + member.bytes
        return self


class Shard(TarIndex):
    """A tar of latents of one shape and, in a data set with captions, the side-car tar with their captions."""

    samples: int = Field(ge=1)
    shape: Shape | None = Field(None, description="[C, T, H, W] if it differs from the shape of the data set")
    text: TarIndex | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(m.samples for m in self.members) != self.samples:
            raise ValueError(f"{self.name}: the members' samples do not add up to {self.samples}")
        if self.text and [(m.name, m.samples) for m in self.text.members] != [
            (m.name, m.samples) for m in self.members
        ]:
            raise ValueError(f"{self.text.name}: its members differ from those of {self.name}")
        return self


class TextEncoding(_Record):
    """Text encoder of the captions, and the encoded empty caption, which replaces captions dropped in training."""

    encoder: str = Field(description="class of the text encoder")
    location: str
    digest: str = Field(description="sha256 of the encoder's weights and tokenizer")
    width: int = Field(ge=1, description="D of the tokens [N, D]")
    pooled_width: int = Field(ge=1, description="P of the pooled vector [P]")
    max_tokens: int = Field(ge=1)
    dtype: Literal["float32", "float16", "bfloat16"]
    empty: str = Field(description="a member of a side-car (safetensors, base64) with the empty caption alone")


class ChannelStatistics(_Record):
    """Mean and standard deviation of each channel of the raw latents of all samples, over positions.

    For moments the deviation includes the variance of the posterior.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


class ManifestHeader(_Record):
    """Properties that all latents of a data set share."""

    format: Literal["rdm_scale.latents"] = "rdm_scale.latents"
    version: Literal[1] = 1
    kind: Literal["mode", "moments"] = Field(description="latents [K,C,T,H,W], or mean and log-variance [K,2C,T,H,W]")
    dtype: Literal["float32", "float16", "bfloat16"]
    shape: Shape = Field(description="[C, T, H, W] of one latent, for kind moments too; a shard may have another")
    codec: CodecRecord
    class_names: tuple[str, ...] = Field((), description="name of label i; empty for unlabeled data")
    text: TextEncoding | None = None

    @model_validator(mode="after")
    def _check_header(self) -> Self:
        if min(self.shape) < 1:
            raise ValueError(f"impossible latent shape {list(self.shape)}: every size must be at least 1")
        for name in ("shift", "scale"):
            if len(getattr(self.codec, name)) not in (1, self.shape[0]):
                raise ValueError(f"codec.{name} must have 1 or {self.shape[0]} entries")
        if not all(self.codec.scale):
            raise ValueError("codec.scale must not be 0")
        return self

    def stored_shape(self, shape: Shape) -> Shape:
        """Shape of one stored sample: [C, T, H, W], or [2C, T, H, W] for moments (means, then log-variances)."""
        C, T, H, W = shape
        return (2 * C if self.kind == "moments" else C), T, H, W

    def sample_bytes(self, shape: Shape) -> int:
        """Bytes of the stored latents of one sample."""
        return math.prod(self.stored_shape(shape)) * STORED_DTYPES[self.dtype].bytes


class Manifest(ManifestHeader):
    """Index of a data set: a folder of latent shards."""

    job: str = Field("", description="hash of the inputs and settings of the encoding job")
    samples: int = Field(ge=1)
    rejected: int = Field(0, ge=0, description="inputs that could not be encoded: see rejected.jsonl")
    statistics: ChannelStatistics | None = None
    shards: tuple[Shard, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(shard.samples for shard in self.shards) != self.samples:
            raise ValueError(f"the shards' samples do not add up to {self.samples}")
        names = [tar.name for shard in self.shards for tar in (shard, shard.text) if tar]
        if len(set(names)) != len(names):
            raise ValueError("two shards have the same name")
        for shard in self.shards:
            shape = self.shape_of(shard)
            if min(shape) < 1 or shape[0] != self.shape[0]:
                raise ValueError(f"{shard.name}: impossible latent shape {list(shape)}")
            if (shard.text is None) != (self.text is None):
                raise ValueError(f"{shard.name}: either all shards and the data set itself have captions, or none")
            for member in shard.members:
                # This also bounds all counts by the sizes of existing files.
                if member.bytes < member.samples * self.sample_bytes(shape):
                    raise ValueError(f"{shard.name}: member {member.name} is too small for {member.samples} samples")
        return self

    def shape_of(self, shard: Shard) -> Shape:
        """[C, T, H, W] of the latents of a shard."""
        return shard.shape or self.shape

    @cached_property
    def buckets(self) -> dict[Shape, tuple[int, ...]]:
        """Indices of the shards of each shape (a bucket), in the order in which the shapes first occur."""
        found: dict[Shape, list[int]] = {}
        for index, shard in enumerate(self.shards):
            found.setdefault(self.shape_of(shard), []).append(index)
        return {shape: tuple(indices) for shape, indices in found.items()}

    def to_json(self) -> bytes:
        """Content of the manifest file."""
        return self.model_dump_json(indent=1, exclude_none=True).encode()

    @cached_property
    def digest(self) -> str:
        """Identity of the data set: sha256 of the manifest without statistics, so it changes if any sample does."""
        described = self.model_copy(update={"statistics": None, "rejected": 0})
        return hashlib.sha256(described.to_json()).hexdigest()


class LocatedManifest(NamedTuple):
    """A manifest and the folder of its shards."""

    manifest: Manifest
    folder: Location


def read_manifest(url: str, options: dict[str, Any] | None = None) -> LocatedManifest:
    """Read and validate the manifest at `url`, the file itself or the folder that contains it.

    Args:
        options: options of the fsspec file system.

    Raises:
        DataError: the manifest is missing, unreadable or invalid; the message names its location and the reason.
    """
    location = Location(url, options)
    if not location.name.endswith(".json"):
        location = location / MANIFEST_NAME
    try:
        content = read_bounded(location, DataError, _MAX_BYTES)
    except FileNotFoundError:
        raise DataError(f"there is no manifest {location}: encode a data set first (tools/encode_latents.py)") from None
    except OSError as error:
        raise DataError(f"cannot read the manifest {location}: {error}") from None
    try:
        return LocatedManifest(Manifest.model_validate_json(content), location.parent)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(f"{location} is not a valid manifest: {where}: {first['msg']}") from None


__getattr__ = moved_names(__name__)
