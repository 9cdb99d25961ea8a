"""Latent shards: webdataset tars (USTAR) whose members are safetensors files that pack many samples of one shape.

Shards are written once, in one pass. They are read by members, which every read checks against the manifest.
"""

import hashlib
import io
import re
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Literal, NamedTuple, Self

import numpy.ctypeslib  # noqa: F401 - NumPy imports it lazily while safetensors saves, which fails in two threads at once
import safetensors.torch
import torch
import xxhash
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from rdm_scale.codecs.record import CodecRecord
from rdm_scale.data.manifest import MANIFEST_NAME, Manifest, ManifestHeader, Shape, Shard, TarIndex, TarMember
from rdm_scale.dtypes import STORED_DTYPES
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location, Stat

REMEDY = "copy the shards and their manifest again from where they came from, or encode the data again"


def sample_id(key: str, clip: int = 0, view: int = 0) -> int:
    """Id of a sample: low 63 bits of xxh3_64 of the key of its source, the clip of a video, and the view (a flip)."""
    return xxhash.xxh3_64_intdigest(f"{key}\x1f{clip}\x1f{view}".encode()) & (2**63 - 1)


class ShardWriter:
    """Writes samples of one shape, in the given order, as shards into a folder, and the manifest last.

    The same samples give the same bytes, however they are distributed over calls of `add`. After an error the writer
    removes its shards and cannot be used any more. As a context manager it closes itself, or cleans up after an
    exception.

    Args:
        folder: folder of the shards; created if missing.
        kind: `mode` stores latents [K, C, T, H, W], `moments` mean and log-variance [K, 2C, T, H, W], both raw.
        shape: (C, T, H, W) of one latent, for both kinds.
        class_names: name of label i; empty for unlabeled data.

    Raises:
        DataError: the folder already contains a manifest or shards, or the shape or the codec is invalid.
    """

    def __init__(
        self,
        folder: Location,
        *,
        kind: Literal["mode", "moments"],
        dtype: Literal["float32", "float16", "bfloat16"],
        shape: Shape,
        codec: CodecRecord,
        class_names: tuple[str, ...],
        samples_per_member: int = 64,
        members_per_shard: int = 64,
    ) -> None:
        self.folder = folder
        try:
            taken = [name for name in folder.names() if name == MANIFEST_NAME or re.fullmatch(r"shard-\d+\.tar", name)]
        except OSError as error:
            raise self._as_data_error(error) from None
        if taken:
            raise DataError(f"{folder} already holds {taken[0]}: choose another folder, or remove what is in this one")
        try:
            self._header = ManifestHeader(kind=kind, dtype=dtype, shape=shape, codec=codec, class_names=class_names)
        except ValidationError as error:
            raise DataError(f"{folder} cannot hold such latents: {error.errors()[0]['msg']}") from None
        self._samples_per_member, self._members_per_shard = samples_per_member, members_per_shard
        self._ids: set[int] = set()
        self._pending: list[dict[str, Tensor]] = []  # samples that do not fill a shard yet
        self._shards: list[Shard] = []
        self._manifest: Manifest | None = None
        self._failed = False

    def add(self, latents: Tensor, ids: Tensor, labels: Tensor) -> None:
        """Append K samples.

        Args:
            latents: [K, C or 2C, T, H, W] in the dtype of the data set.
            ids: int64 [K], unique.
            labels: int64 [K], indices into the class names, or -1.

        Raises:
            DataError: wrong shape or dtype, a latent that is not finite, an id that was added before, an unknown label,
                or a shard that cannot be written.
        """
        self._check_open()
        try:
            check_samples(self._header, self._header.shape, latents, ids, labels, self.folder)
            for number in ids.tolist():
                if number in self._ids:
                    raise DataError(f"two samples have the id {number}: {self.folder} takes a key, clip and view once")
                self._ids.add(number)
            added = {"latents": latents.detach(), "ids": ids, "labels": labels}
            # Copied, because the caller may reuse its tensors.
            self._pending.append({name: values.to("cpu", copy=True) for name, values in added.items()})
            full = self._samples_per_member * self._members_per_shard
            while self._pending_samples() >= full:
                self._write_shard(full)
        except BaseException as error:
            self.discard()
            raise self._as_data_error(error) from None

    def close(self) -> Manifest:
        """Write the remaining samples and then the manifest.

        Raises:
            DataError: no samples were added, or the folder cannot be written.
        """
        if self._manifest is not None:
            return self._manifest
        self._check_open()
        try:
            if not self._ids:
                raise DataError(f"no samples were added, so there is nothing to write to {self.folder}")
            if self._pending_samples():
                self._write_shard(self._pending_samples())
            manifest = Manifest(**dict(self._header), samples=len(self._ids), shards=tuple(self._shards))
            (self.folder / MANIFEST_NAME).write(manifest.to_json())
        except BaseException as error:
            self.discard()
            raise self._as_data_error(error) from None
        self._manifest = manifest
        return manifest

    def discard(self) -> None:
        """Remove the shards that were written and close the writer."""
        self._failed = True
        for shard in self._shards:
            with suppress(OSError):
                (self.folder / shard.name).remove()
        self._shards, self._pending = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._failed or self._manifest is not None:
            return
        if error is None:
            self.close()
        else:
            self.discard()

    def _check_open(self) -> None:
        if self._failed or self._manifest is not None:
            raise RuntimeError(f"the writer of {self.folder} is closed")

    def _as_data_error(self, error: BaseException) -> BaseException:
        return DataError(f"cannot write to {self.folder}: {error}") if isinstance(error, OSError) else error

    def _pending_samples(self) -> int:
        return sum(len(part["ids"]) for part in self._pending)

    def _write_shard(self, samples: int) -> None:
        """Move the first `samples` pending samples into a shard."""
        joined = {name: torch.cat([part[name] for part in self._pending]) for name in self._pending[0]}
        # Cloned, so that the remainder does not keep the memory of all that was added.
        self._pending = [{name: values[samples:].clone() for name, values in joined.items()}]
        first = len(self._shards) * self._members_per_shard
        parts = {name: values[:samples].split(self._samples_per_member) for name, values in joined.items()}
        members = [
            PackedMember(f"{first + i:08d}.safetensors", len(ids), pack_samples(latents, ids, labels))
            for i, (latents, ids, labels) in enumerate(
                zip(parts["latents"], parts["ids"], parts["labels"], strict=True)
            )
        ]
        tar = write_tar(self.folder, f"shard-{len(self._shards):06d}.tar", members)
        self._shards.append(Shard(**dict(tar), samples=samples))


class PackedMember(NamedTuple):
    """A member to be written: its name, its number of samples, and the content of its safetensors file."""

    name: str
    samples: int
    content: bytes


def pack_samples(latents: Tensor, ids: Tensor, labels: Tensor) -> bytes:
    """Content of a member with these samples."""
    return safetensors.torch.save({"latents": latents.contiguous(), "ids": ids.clone(), "labels": labels.clone()})


def write_tar(folder: Location, name: str, members: Sequence[PackedMember]) -> TarIndex:
    """Write the members as one tar, atomically; the bytes depend on nothing but the members.

    Raises:
        OSError: the tar cannot be written.
    """
    buffer, offsets = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for member in members:
            info = tarfile.TarInfo(member.name)  # mtime 0, uid 0, gid 0, mode 0644, no user name
            info.size = len(member.content)
            offsets.append(tar.offset + tarfile.BLOCKSIZE)
            tar.addfile(info, io.BytesIO(member.content))
    content = buffer.getvalue()
    folder.make_dir()
    (folder / name).write(content)
    records = (
        TarMember(name=n, offset=o, bytes=len(c), samples=k, xxh3=xxhash.xxh3_64_hexdigest(c))
        for (n, k, c), o in zip(members, offsets, strict=True)
    )
    return TarIndex(name=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest(), members=tuple(records))


def check_samples(
    header: ManifestHeader, shape: Shape, latents: Tensor, ids: Tensor, labels: Tensor, folder: Location
) -> None:
    """Raise DataError unless shape, dtype, values, ids and labels of these samples are valid for `folder`."""
    dtype, stored = STORED_DTYPES[header.dtype].torch, header.stored_shape(shape)
    if latents.dtype != dtype or latents.ndim != 5 or latents.shape[1:] != stored:
        raise DataError(
            f"{folder} takes latents {['K', *stored]} in {dtype}, not {list(latents.shape)} in {latents.dtype}"
        )
    for name, values in (("ids", ids), ("labels", labels)):
        if values.dtype != torch.int64 or values.shape != (len(latents),):
            raise DataError(
                f"{name} must be int64 [{len(latents)}], one per latent, not {values.dtype} {list(values.shape)}"
            )
    finite = latents.flatten(1).isfinite().all(dim=1)
    if not finite.all():
        raise DataError(
            f"the latent of the sample with id {ids[~finite][0].item()} is not finite in {dtype}: "
            "fix or leave out the input, or use a wider dtype"
        )
    classes = len(header.class_names)
    unknown = (labels < -1) | (labels >= classes)
    if unknown.any():
        raise DataError(
            f"the sample with id {ids[unknown][0].item()} has label {labels[unknown][0].item()}, "
            f"and there are {classes} class names: use 0 .. {classes - 1}, or -1 for unlabeled"
        )
    if (ids < 0).any():
        raise DataError(f"the id {ids.min().item()} is negative: ids are made by sample_id")


def read_member(folder: Location, manifest: Manifest, shard: int, member: int) -> dict[str, Tensor]:
    """Read the samples of one member by one range request and check them against the manifest.

    Returns:
        `latents` [K, C or 2C, T, H, W] in the dtype of the data set, raw; `ids` and `labels`, int64 [K].

    Raises:
        DataError: the shard is missing, cannot be read, is too short, or its content is not what was written.
    """
    record = manifest.shards[shard]
    return unpack_samples(read_bytes(folder, record, member), folder, manifest, shard, member)


def read_bytes(folder: Location, tar: TarIndex, member: int, opened: Stat | None = None) -> bytes:
    """Read the content of one member of a tar; arguments and errors are those of `read_members`."""
    content = bytearray(tar.members[member].bytes)
    read_members(folder, tar, member, member + 1, memoryview(content), opened)
    return bytes(content)


def read_members(
    folder: Location, tar: TarIndex, first: int, end: int, buffer: memoryview, opened: Stat | None = None
) -> list[memoryview]:
    """Read members `first` .. `end` - 1 of a tar by one request and check them.

    Args:
        buffer: memory of `span_bytes` bytes for the content.
        opened: size and version of the file when the data set was opened, to tell a replaced file from a damaged one.

    Returns:
        The content of each member, a part of the buffer.

    Raises:
        DataError: the tar is missing, unreadable, truncated, or not what the manifest says.
    """
    parts, place = tar.members[first:end], folder / tar.name
    offset = parts[0].offset
    try:
        read = place.read_into(offset, buffer)
        contents = [buffer[part.offset - offset :][: part.bytes] for part in parts]
        for member, (part, content) in enumerate(zip(parts, contents, strict=True), first):
            complete = part.offset + part.bytes - offset <= read
            checksum = xxhash.xxh3_64_hexdigest(content) if complete else None
            if checksum != part.xxh3:
                raise _not_as_written(place, tar, member, checksum, opened, place.stat())
    except FileNotFoundError:
        raise DataError(f"{place} is missing, and the manifest lists it: {REMEDY}") from None
    except OSError as error:
        raise DataError(f"cannot read {_describe(place, parts[0], first)}: {error}") from None
    return contents


def span_bytes(tar: TarIndex, first: int, end: int) -> int:
    """Bytes from the start of member `first` to the end of member `end` - 1."""
    last = tar.members[end - 1]
    return last.offset + last.bytes - tar.members[first].offset


def _not_as_written(
    place: Location, tar: TarIndex, member: int, checksum: str | None, opened: Stat | None, found: Stat
) -> DataError:
    """The error of a member whose checksum differs, or is None because the file ends before the member does."""
    part = tar.members[member]
    if opened is not None and found != opened:
        return DataError(
            f"{place} was replaced while it was in use: it had {opened.bytes} bytes and version {opened.version}, and "
            f"has {found.bytes} bytes and version {found.version}; member {part.name} ({member}) is no longer what the "
            f"manifest says. Put the file back as it was, or encode into another folder: {REMEDY}"
        )
    if checksum is None:
        return DataError(
            f"{place} is shorter than the manifest says, {found.bytes} bytes instead of {tar.bytes}, "
            f"and ends before the end of member {part.name} ({member}): {REMEDY}"
        )
    return DataError(
        f"{_describe(place, part, member)} is not what was written: its xxh3 is {checksum}, "
        f"the manifest says {part.xxh3}: {REMEDY}"
    )


def unpack_samples(content: bytes, folder: Location, manifest: Manifest, shard: int, member: int) -> dict[str, Tensor]:
    """The tensors of a member.

    Raises:
        DataError: they are not what the manifest says.
    """
    record = manifest.shards[shard]
    where = _describe(folder / record.name, record.members[member], member)
    try:
        tensors = safetensors.torch.load(content)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{where} is not a safetensors file ({error}): {REMEDY}") from None
    _check_member(tensors, manifest, manifest.shape_of(record), record.members[member].samples, where)
    return tensors


def _describe(place: Location, part: TarMember, member: int) -> str:
    return f"member {part.name} ({member}, bytes {part.offset} to {part.offset + part.bytes}) of {place}"


def _check_member(tensors: dict[str, Tensor], header: ManifestHeader, shape: Shape, samples: int, where: str) -> None:
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "latents": ((samples, *header.stored_shape(shape)), STORED_DTYPES[header.dtype].torch),
        "ids": ((samples,), torch.int64),
        "labels": ((samples,), torch.int64),
    }
    if tensors.keys() != expected.keys():
        raise DataError(f"{where} holds {sorted(tensors)} instead of {sorted(expected)}: {REMEDY}")
    for name, (size, dtype) in expected.items():
        found = tensors[name]
        if found.shape != size or found.dtype != dtype:
            raise DataError(
                f"{where} holds {name} {list(found.shape)} in {found.dtype}, "
                f"the manifest says {list(size)} in {dtype}: {REMEDY}"
            )
    labels = tensors["labels"]
    if labels.min() < -1 or labels.max() >= len(header.class_names):
        raise DataError(
            f"{where} has labels from {labels.min()} to {labels.max()}, "
            f"and the manifest names {len(header.class_names)} classes: {REMEDY}"
        )
