"""Looking at encoded data: whether all of it is right, what its statistics are, and what it decodes to."""

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator

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
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location

_REPEATED_SHOWN = 10

Progress = Callable[[int], object]  # called with the number of samples just looked at


def verify(url: str, progress: Progress = lambda samples: None) -> tuple[Manifest, list[str]]:
    """Reads every byte of a set and checks it against the manifest.

    Sizes, sha256 of each shard, the tars' own lists of members, checksums, shapes, types, labels, finite values, ids
    that occur twice, and captions that do not belong to their samples.

    Returns:
        The manifest, and a line for each fault.

    Raises:
        DataError: there is no valid manifest.
    """
    opened = open_dataset(DataSource(path=url))
    ids: dict[str, Tensor] = {}  # of each member
    faults: list[str] = []
    for index, shard in enumerate(opened.manifest.shards):
        if index in opened.damaged:
            faults.append(str(opened.damaged[index]))
        else:
            faults += _verify_shard(opened, index, ids)
        progress(shard.samples)
    return opened.manifest, [*faults, *_repeated(ids)]


def _verify_shard(opened: OpenDataset, index: int, ids: dict[str, Tensor]) -> Iterator[str]:
    manifest, folder = opened.manifest, opened.folder
    shard = manifest.shards[index]
    contents: list[list[bytes | None]] = []  # of the members of the shard, and of its side-car
    for tar in (shard, shard.text):
        if tar is not None:
            members, faults = _read_tar(folder / tar.name, tar)
            contents.append(members)
            yield from faults
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
            yield f"{where} and the captions beside it are not of the same samples: encode the data again"


def _read_tar(place: Location, tar: TarIndex) -> tuple[list[bytes | None], list[str]]:
    """The members of a tar, None for those that are not what was written, and what is wrong with it."""
    try:
        content = place.read()
    except OSError as error:
        return [None] * len(tar.members), [f"cannot read {place}: {error}"]
    faults: list[str] = []
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as file:
            listed = [(member.name, member.offset_data, member.size) for member in file]
    except tarfile.TarError as error:
        faults.append(f"{place} is not a tar: {error}")
    else:
        if listed != [(member.name, member.offset, member.bytes) for member in tar.members]:
            faults.append(f"{place} lists other members, or lists them elsewhere, than the manifest")
    members: list[bytes | None] = []
    for member in tar.members:
        part = content[member.offset : member.offset + member.bytes]
        whole = xxhash.xxh3_64_hexdigest(part) == member.xxh3
        members.append(part if whole else None)
        if not whole:
            faults.append(f"member {member.name} of {place} is not what was written: its xxh3 is another")
    if not faults and hashlib.sha256(content).hexdigest() != tar.sha256:
        faults.append(f"{place} is not what was written: its sha256 is another, though its members are whole")
    return members, faults


def _caption_ids(content: bytes, manifest: Manifest, folder: Location, tar: TarIndex, number: int) -> Tensor:
    member, text = tar.members[number], manifest.text
    assert text is not None
    where = f"member {member.name} of {folder / tar.name}"
    return unpack_text(
        content, member.samples, text.width, text.pooled_width, STORED_DTYPES[text.dtype].torch, where
    ).ids


def _repeated(ids: dict[str, Tensor]) -> Iterator[str]:
    """Ids that occur more than once. Sorted, since a dictionary of ten million would take a gigabyte."""
    if not ids:
        return
    ordered = torch.cat(list(ids.values())).sort().values
    repeated = ordered[1:][ordered.diff() == 0].unique()
    for number in repeated[:_REPEATED_SHOWN].tolist():
        places = " and ".join(where for where, held in ids.items() for _ in range(int((held == number).sum())))
        yield f"the id {number} is in {places}: every sample must be there once"
    if (more := len(repeated) - _REPEATED_SHOWN) > 0:
        yield f"{more} other ids are there more than once"


def measure(url: str, progress: Progress = lambda samples: None) -> Manifest:
    """Computes the statistics of the raw latents of a set and writes them into its manifest.

    Raises:
        DataError: the set is damaged, or its manifest cannot be written.
    """
    manifest, folder = read_manifest(url)
    channels = manifest.shape[0]
    count, total, squares = 0, torch.zeros(channels).double(), torch.zeros(channels).double()
    for index, shard in enumerate(manifest.shards):
        for number, member in enumerate(shard.members):
            latents = read_member(folder, manifest, index, number)["latents"].double()
            if not latents.isfinite().all():
                raise DataError(f"member {member.name} of {folder / shard.name} holds latents that are not finite")
            mean, variance = latents[:, :channels], torch.zeros(())
            if manifest.kind == "moments":
                variance = clamp_log_variance(latents[:, channels:]).exp()
            count += mean[:, 0].numel()
            total += mean.sum((0, 2, 3, 4))
            squares += (mean.square() + variance).sum((0, 2, 3, 4))
            progress(member.samples)
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    statistics = ChannelStatistics(mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    measured = manifest.model_copy(update={"statistics": statistics})
    place = Location(url) if url.endswith(".json") else folder / MANIFEST_NAME
    try:
        place.write(measured.to_json())
    except OSError as error:
        raise DataError(f"cannot write {place}: {error}") from None
    return measured


def decoded(url: str, codec: LatentCodec, count: int) -> dict[Shape, Tensor]:
    """Samples from all over a set, decoded to pixels [N, 3, T, H, W] in [-1, 1], by the shape of their latents.

    Raises:
        DataError: the set is damaged, or the codec does not fit it.
    """
    manifest, folder = read_manifest(url)
    count = min(count, manifest.samples)
    wanted = [index * manifest.samples // count for index in range(count)]
    pixels: dict[Shape, list[Tensor]] = {}
    first = 0
    for index, shard in enumerate(manifest.shards):
        for number, member in enumerate(shard.members):
            chosen = [place - first for place in wanted if first <= place < first + member.samples]
            first += member.samples
            if chosen:
                latents = read_member(folder, manifest, index, number)["latents"]
                modes = normalize(latents[chosen, : manifest.shape[0]].float(), manifest.codec)
                pixels.setdefault(manifest.shape_of(shard), []).append(codec.decode(modes).cpu())
    return {shape: torch.cat(parts) for shape, parts in pixels.items()}
