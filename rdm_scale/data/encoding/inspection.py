"""Looking at encoded data: whether all of it is right, what its statistics are, and what it decodes to."""

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rdm_scale.config import DataSource
from rdm_scale.data.captions import unpack_text
from rdm_scale.data.codecs import LatentCodec, normalise
from rdm_scale.data.manifest import NAME, Manifest, Shape, Statistics, Tar, read_manifest
from rdm_scale.data.reader import OpenSet, open_set
from rdm_scale.data.shards import DTYPES, read_bytes, read_member, unpack_samples
from rdm_scale.data.storage import Location
from rdm_scale.errors import DataError

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
    opened = open_set(DataSource(path=url))
    ids: dict[int, str] = {}
    faults: list[str] = []
    for index, shard in enumerate(opened.manifest.shards):
        if index in opened.damaged:
            faults.append(str(opened.damaged[index]))
        else:
            faults += _verify_shard(opened, index, ids)
        progress(shard.samples)
    return opened.manifest, faults


def _verify_shard(opened: OpenSet, index: int, ids: dict[int, str]) -> Iterator[str]:
    manifest, folder = opened.manifest, opened.folder
    shard = manifest.shards[index]
    for tar in (shard, shard.text):
        if tar is not None:
            yield from _verify_tar(folder, tar)
    for number, member in enumerate(shard.members):
        where = f"member {member.name} of {folder / shard.name}"
        try:
            samples = unpack_samples(read_bytes(folder, shard, number), folder, manifest, index, number)
            captions = None if shard.text is None else _captions_ids(manifest, folder, shard.text, number)
        except DataError as error:
            yield str(error)
            continue
        if not samples["latents"].isfinite().all():
            yield f"{where} holds latents that are not finite: encode the data again"
        if captions is not None and not captions.equal(samples["ids"]):
            yield f"{where} and the captions beside it are not of the same samples: encode the data again"
        for sample in samples["ids"].tolist():
            if sample in ids:
                yield f"{where} holds the id {sample}, and so does {ids[sample]}: every sample must be there once"
            ids[sample] = where


def _captions_ids(manifest: Manifest, folder: Location, tar: Tar, number: int) -> Tensor:
    assert manifest.text is not None
    member, text = tar.members[number], manifest.text
    content = read_bytes(folder, tar, number)
    where = f"member {member.name} of {folder / tar.name}"
    return unpack_text(content, member.samples, text.width, text.pooled_width, DTYPES[text.dtype], where).ids


def _verify_tar(folder: Location, tar: Tar) -> Iterator[str]:
    place = folder / tar.name
    try:
        content = place.read()
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as file:
            found = [(member.name, member.offset_data, member.size) for member in file]
    except (OSError, tarfile.TarError) as error:
        yield f"cannot read {place}: {error}"
        return
    if hashlib.sha256(content).hexdigest() != tar.sha256:
        yield f"{place} is not what was written: its sha256 differs from the manifest's"
    if found != [(member.name, member.offset, member.bytes) for member in tar.members]:
        yield f"{place} lists other members, or lists them elsewhere, than the manifest"


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
            mean, variance = latents[:, :channels], torch.zeros(())
            if manifest.kind == "moments":
                variance = latents[:, channels:].clamp(-30, 20).exp()
            count += mean[:, 0].numel()
            total += mean.sum((0, 2, 3, 4))
            squares += (mean.square() + variance).sum((0, 2, 3, 4))
            progress(member.samples)
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    statistics = Statistics(mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    measured = manifest.model_copy(update={"statistics": statistics})
    try:
        (folder / NAME).write(measured.to_json())
    except OSError as error:
        raise DataError(f"cannot write {folder / NAME}: {error}") from None
    return measured


def decoded(url: str, codec: LatentCodec, count: int) -> dict[Shape, Tensor]:
    """Samples from all over a set, decoded to pixels [N, 3, T, H, W] in [-1, 1], by the shape of their latents.

    Raises:
        DataError: the set is damaged, or the codec does not fit it.
    """
    manifest, folder = read_manifest(url)
    wanted = [index * manifest.samples // count for index in range(min(count, manifest.samples))]
    pixels: dict[Shape, list[Tensor]] = {}
    first = 0
    for index, shard in enumerate(manifest.shards):
        for number, member in enumerate(shard.members):
            chosen = [place - first for place in wanted if first <= place < first + member.samples]
            first += member.samples
            if chosen:
                latents = read_member(folder, manifest, index, number)["latents"]
                modes = normalise(latents[chosen, : manifest.shape[0]].float(), manifest.codec)
                pixels.setdefault(manifest.shape_of(shard), []).append(codec.decode(modes).cpu())
    return {shape: torch.cat(parts) for shape, parts in pixels.items()}
