"""Inspection of encoded data sets: verification of every byte, channel statistics, and decoded samples."""

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from rdm_scale.codecs import LatentCodec, normalize
from rdm_scale.codecs.codec import clamp_log_variance
from rdm_scale.config import DataSource
from rdm_scale.data.captions import unpack_text
from rdm_scale.data.dataset import OpenDataset, open_dataset
from rdm_scale.data.manifest import MANIFEST_NAME, ChannelStatistics, Manifest, Shape, TarIndex, read_manifest
from rdm_scale.data.shards import read_member, unpack_samples
from rdm_scale.dtypes import STORED_DTYPES
from rdm_scale.encoding.moments import MomentAccumulator
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location

_REPEATED_SHOWN = 10

Progress = Callable[[int], object]  # called with the number of samples just inspected


class Verification(NamedTuple):
    """Result of `verify`."""

    manifest: Manifest
    faults: list[str]  # one line each


def verify(url: str, progress: Progress = lambda samples: None) -> Verification:
    """Read every byte of a data set and check it against the manifest.

    Checks sizes, the sha256 of each shard, the headers of the tars, checksums, shapes, dtypes and labels, that values
    are finite, that ids are unique, and that captions belong to their samples.

    Raises:
        DataError: there is no valid manifest.
    """
    opened = open_dataset(DataSource(path=url))
    ids: dict[str, Tensor] = {}  # by member
    faults: list[str] = []
    for index, shard in enumerate(opened.manifest.shards):
        if index in opened.damaged:
            faults.append(str(opened.damaged[index]))
        else:
            faults += _verify_shard(opened, index, ids)
        progress(shard.samples)
    return Verification(opened.manifest, [*faults, *_repeated(ids)])


def _verify_shard(opened: OpenDataset, index: int, ids: dict[str, Tensor]) -> Iterator[str]:
    manifest, folder = opened.manifest, opened.folder
    shard = manifest.shards[index]
    contents: list[list[bytes | None]] = []  # of the members of the shard, and of its side-car
    for tar in (shard, shard.text):
        if tar is not None:
            found = _read_tar(folder / tar.name, tar)
            contents.append(found.members)
            yield from found.faults
    for number, (content, *text) in enumerate(zip(*contents, strict=True)):
        where = f"member {shard.members[number].name} of {folder / shard.name}"
        if content is None or None in text:
            continue
        try:
            samples = unpack_samples(content, folder, manifest, index, number)
            captions = [_caption_ids(one, manifest, folder, shard.text, number) for one in text if shard.text and one]
        except DataError as error:
            yield str(error)
            continue
        ids[where] = samples["ids"]
        if not samples["latents"].isfinite().all():
            yield f"{where} holds latents that are not finite: encode the data again"
        if any(not one.equal(samples["ids"]) for one in captions):
            yield f"{where} and its captions are of different samples: encode the data again"


class _TarContent(NamedTuple):
    members: list[bytes | None]  # None: damaged
    faults: list[str]


def _read_tar(file: Location, tar: TarIndex) -> _TarContent:
    """Read the members of a tar and check them against the manifest."""
    try:
        content = file.read()
    except OSError as error:
        return _TarContent([None] * len(tar.members), [f"cannot read {file}: {error}"])
    faults: list[str] = []
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as opened:
            listed = [(member.name, member.offset_data, member.size) for member in opened]
    except tarfile.TarError as error:
        faults.append(f"{file} is not a tar: {error}")
    else:
        if listed != [(member.name, member.offset, member.bytes) for member in tar.members]:
            faults.append(f"the headers in {file} name other members or offsets than the manifest")
    members: list[bytes | None] = []
    for member in tar.members:
        part = content[member.offset : member.offset + member.bytes]
        intact = xxhash.xxh3_64_hexdigest(part) == member.xxh3
        members.append(part if intact else None)
        if not intact:
            faults.append(f"member {member.name} of {file} is not what was written: its xxh3 differs")
    if not faults and hashlib.sha256(content).hexdigest() != tar.sha256:
        faults.append(f"{file} is not what was written: its sha256 differs, although its members are intact")
    return _TarContent(members, faults)


def _caption_ids(content: bytes, manifest: Manifest, folder: Location, tar: TarIndex, number: int) -> Tensor:
    member, text = tar.members[number], manifest.text
    assert text is not None
    where = f"member {member.name} of {folder / tar.name}"
    return unpack_text(
        content, member.samples, text.width, text.pooled_width, STORED_DTYPES[text.dtype].torch, where
    ).ids


def _repeated(ids: dict[str, Tensor]) -> Iterator[str]:
    """Find ids that occur more than once, by sorting: a dictionary of ten million would take a gigabyte."""
    if not ids:
        return
    ordered = torch.cat(list(ids.values())).sort().values
    repeated = ordered[1:][ordered.diff() == 0].unique()
    for number in repeated[:_REPEATED_SHOWN].tolist():
        places = " and ".join(where for where, held in ids.items() for _ in range(int((held == number).sum())))
        yield f"the id {number} is in {places}: ids must be unique"
    if (more := len(repeated) - _REPEATED_SHOWN) > 0:
        yield f"{more} other ids occur more than once"


def measure_statistics(url: str, progress: Progress = lambda samples: None) -> Manifest:
    """Compute the channel statistics of the raw latents of a data set and write them into its manifest.

    Raises:
        DataError: the data set is damaged, or its manifest cannot be written.
    """
    manifest, folder = read_manifest(url)
    channels = manifest.shape[0]
    moments = MomentAccumulator(channels)
    for index, shard in enumerate(manifest.shards):
        for number, member in enumerate(shard.members):
            latents = read_member(folder, manifest, index, number)["latents"].double()
            if not latents.isfinite().all():
                raise DataError(
                    f"member {member.name} of {folder / shard.name} holds latents that are not finite: encode the data "
                    "again"
                )
            posterior = manifest.kind == "moments"
            variance = clamp_log_variance(latents[:, channels:]).exp() if posterior else None
            moments.add(latents[:, :channels], variance)
            progress(member.samples)
    statistics = ChannelStatistics(mean=tuple(moments.mean.tolist()), std=tuple(moments.std.tolist()))
    measured = manifest.model_copy(update={"statistics": statistics})
    file = Location(url) if url.endswith(".json") else folder / MANIFEST_NAME
    try:
        file.write(measured.to_json())
    except OSError as error:
        raise DataError(f"cannot write {file}: {error}") from None
    return measured


def decode_samples(url: str, codec: LatentCodec, count: int) -> dict[Shape, Tensor]:
    """Decode samples spaced evenly over a data set.

    Returns:
        Pixels [N, 3, T, H, W] in [-1, 1], by the shape of their latents.

    Raises:
        DataError: the data set is damaged, or the codec does not fit it.
    """
    manifest, folder = read_manifest(url)
    count = min(count, manifest.samples)
    wanted = [index * manifest.samples // count for index in range(count)]
    pixels: dict[Shape, list[Tensor]] = {}
    first = 0
    for index, shard in enumerate(manifest.shards):
        for number, member in enumerate(shard.members):
            chosen = [position - first for position in wanted if first <= position < first + member.samples]
            first += member.samples
            if chosen:
                latents = read_member(folder, manifest, index, number)["latents"]
                modes = normalize(latents[chosen, : manifest.shape[0]].float(), manifest.codec)
                pixels.setdefault(manifest.shape_of(shard), []).append(codec.decode(modes).cpu())
    return {shape: torch.cat(parts) for shape, parts in pixels.items()}
