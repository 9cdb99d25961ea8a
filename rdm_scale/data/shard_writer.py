"""Writing of latent shards: webdataset tars (USTAR) whose members are safetensors files with many samples of one shape.

`ShardWriter` writes the shards of a data set in one pass. The encoding job, which resumes and whose ranks share the
work, writes them one by one with `pack_samples` and `write_tar`.
"""

import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Literal, NamedTuple, Self

import numpy.ctypeslib  # noqa: F401 - NumPy imports it lazily while safetensors saves, which fails in two threads at once
import safetensors.torch
import torch
import xxhash
from pydantic import ValidationError
from torch import Tensor

from rdm_scale.codecs.record import CodecRecord
from rdm_scale.data.manifest import MANIFEST_NAME, Manifest, ManifestHeader, Shape, Shard, TarIndex, TarMember
from rdm_scale.dtypes import STORED_DTYPES
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location
from rdm_scale.storage.ustar import pack_ustar


def sample_id(key: str, clip: int = 0, view: int = 0) -> int:
    """Id of a sample: low 63 bits of xxh3_64 of the key of its source, the clip of a video, and the view (a flip)."""
    return xxhash.xxh3_64_intdigest(f"{key}\x1f{clip}\x1f{view}".encode()) & (2**63 - 1)


class ShardWriter:
    """Writer of samples of one shape, in the given order, as shards into a folder, and of the manifest last.

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
            raise DataError(f"{folder} already contains {taken[0]}: choose another folder, or remove its content")
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
                    raise DataError(
                        f"two samples have the id {number}: write each key, clip and view to {self.folder} only once"
                    )
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
    """Name, number of samples and content (a safetensors file) of a member to write."""

    name: str
    samples: int
    content: bytes


def pack_samples(latents: Tensor, ids: Tensor, labels: Tensor) -> bytes:
    """Pack samples as the content of a member, in safetensors format."""
    return safetensors.torch.save({"latents": latents.contiguous(), "ids": ids.clone(), "labels": labels.clone()})


def write_tar(folder: Location, name: str, members: Sequence[PackedMember]) -> TarIndex:
    """Write the members as one tar, atomically; the bytes depend on nothing but the members.

    Raises:
        OSError: the tar cannot be written.
    """
    content, offsets = pack_ustar((member.name, member.content) for member in members)
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
        raise DataError(f"the id {ids.min().item()} is negative: make ids with sample_id")
