"""Reading of latent shards, member by member, with every member checked against the manifest.

A shard is a webdataset tar (USTAR) whose members are safetensors files with many samples of one shape; `shard_writer`
writes it.
"""

import safetensors.torch
import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor

from rdm_scale.data.manifest import Manifest, ManifestHeader, Shape, TarIndex, TarMember
from rdm_scale.dtypes import STORED_DTYPES
from rdm_scale.errors import DataError
from rdm_scale.moved import moved_names
from rdm_scale.storage.location import Location, Stat

REMEDY = "copy the shards and their manifest again from where they came from, or encode the data again"


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
    """Error for a member whose checksum differs, or is None because the file ends before the member does."""
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
    """Unpack the tensors of a member and check them against the manifest.

    Raises:
        DataError: they do not match it.
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


__getattr__ = moved_names(__name__)
