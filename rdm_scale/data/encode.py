"""From found images to latent shards: who is held out, in which order, through which codec.

Both are functions of a sample's key and the seed alone, so that a sample never changes sides when data are added. At
most the keys and one batch of images are in memory.
"""

import posixpath
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rdm_scale import rng
from rdm_scale.data.codecs import ImageCodec, normalise
from rdm_scale.data.images import ImageFile, ImageSet
from rdm_scale.data.manifest import NAME, Codec, Manifest
from rdm_scale.data.shards import DTYPES, ShardWriter, sample_id
from rdm_scale.data.storage import Location
from rdm_scale.errors import DataError

_READERS = 8  # threads that read and decode the images of a batch


@dataclass(frozen=True)
class Holdout:
    """The share of the samples (0 < share < 1) that goes into a set of its own, for validation."""

    folder: Location
    share: float


@dataclass(frozen=True)
class Encoded:
    """What was written, and the mean and standard deviation of the normalised training latents over all elements."""

    train: Manifest
    holdout: Manifest | None
    mean: float
    std: float


def is_held_out(key: str, seed: int, share: float) -> bool:
    return rng.key(seed, "holdout", key) < share * 2**63


def split(images: Sequence[ImageFile], seed: int, share: float) -> tuple[list[ImageFile], list[ImageFile]]:
    """(training, held-out) images, each in an order that depends on nothing but their keys and the seed."""
    shuffled = sorted(images, key=lambda image: (rng.key(seed, "shuffle", image.key), image.key))
    sides: tuple[list[ImageFile], list[ImageFile]] = ([], [])
    for image in shuffled:
        sides[is_held_out(image.key, seed, share)].append(image)
    return sides


def load_batches(
    images: Sequence[ImageFile], size: int, batch_size: int
) -> Iterator[tuple[Sequence[ImageFile], Tensor]]:
    """Batches of images with their pixels [B, 3, size, size] in [-1, 1]. Raises DataError: one cannot be decoded."""
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            yield batch, torch.stack(list(pool.map(lambda image: image.load(size), batch)))


def encode_images(
    source: ImageSet,
    codec: ImageCodec,
    folder: Location,
    *,
    size: int,
    kind: Literal["mode", "moments"],
    dtype: Literal["float32", "float16", "bfloat16"],
    seed: int,
    batch_size: int,
    holdout: Holdout | None = None,
    progress: Callable[[int], object] = lambda samples: None,
) -> Encoded:
    """Encodes all images at size x size pixels into shards in `folder`, and the held-out ones into shards of their own.

    The manifests are written last; after an error or an interrupt nothing is left behind.

    Args:
        progress: called after every batch with its number of samples.

    Raises:
        DataError: a folder is in use, the size does not fit the codec, one side would be empty, an image cannot be
            decoded, a latent is not finite in `dtype`, or the output cannot be written.
    """
    shape = codec.latent_shape(size, size)
    train, held_out = split(source.images, seed, holdout.share if holdout else 0.0)
    if holdout and not (train and held_out):
        raise DataError(
            f"a share of {holdout.share} holds out {len(held_out)} of {len(source.images)} images: "
            "both sides need at least one; change the share or add images"
        )
    sides = [(train, folder)] + ([(held_out, holdout.folder)] if holdout else [])
    manifests, statistics = [], _Statistics(kind)
    with _new_folders([place for _, place in sides]):
        for images, place in sides:
            writer = ShardWriter(
                place, kind=kind, dtype=dtype, shape=shape, codec=codec.record, class_names=source.class_names
            )
            for batch, pixels in load_batches(images, size, batch_size):
                latents = _encode_batch(batch, pixels, codec, kind, DTYPES[dtype])
                if images is train:
                    statistics.add(latents, codec.record)
                ids = torch.tensor([sample_id(image.key) for image in batch])
                writer.add(latents, ids, torch.tensor([image.label for image in batch]))
                progress(len(batch))
            manifests.append(writer.close())
    return Encoded(manifests[0], manifests[1] if holdout else None, *statistics.result())


def reconstruct(images: Sequence[ImageFile], codec: ImageCodec, size: int) -> tuple[Tensor, Tensor]:
    """Originals and their reconstructions by the codec, both [N, 3, size, size], all in one batch."""
    _, originals = next(load_batches(images, size, len(images)))
    modes = codec.encode(originals)[:, : codec.channels]
    return originals, codec.decode(normalise(modes, codec.record)).cpu()


def _encode_batch(
    batch: Sequence[ImageFile], pixels: Tensor, codec: ImageCodec, kind: str, dtype: torch.dtype
) -> Tensor:
    """Latents [B, C or 2C, 1, H, W] as they are stored."""
    moments = codec.encode(pixels)
    latents = (moments if kind == "moments" else moments[:, : codec.channels]).to("cpu", dtype)
    finite = latents.flatten(1).isfinite().all(dim=1)
    if not finite.all():
        worst = batch[int(finite.int().argmin())]
        raise DataError(
            f"the codec {codec.record.location} makes latents of {worst.name} that are not finite in {dtype}: "
            "encode with --dtype float32, or another codec"
        )
    return latents


class _Statistics:
    """Mean and standard deviation of normalised latents, over the posterior too when the moments are kept."""

    def __init__(self, kind: str) -> None:
        self.kind, self.count, self.total, self.squares = kind, 0, 0.0, 0.0

    def add(self, latents: Tensor, record: Codec) -> None:
        mean, log_variance = latents.double(), None
        if self.kind == "moments":
            mean, log_variance = mean.chunk(2, dim=1)
        unit = normalise(mean, record)
        self.count += unit.numel()
        self.total += float(unit.sum())
        self.squares += float(unit.square().sum())
        if log_variance is not None:
            deviation = normalise(mean + (0.5 * log_variance).exp(), record) - unit
            self.squares += float(deviation.square().sum())

    def result(self) -> tuple[float, float]:
        mean = self.total / self.count
        return mean, max(self.squares / self.count - mean**2, 0.0) ** 0.5


@contextmanager
def _new_folders(folders: list[Location]) -> Iterator[None]:
    """Makes the folders, and takes them away again when anything goes wrong inside."""
    for i, one in enumerate(folders):
        for other in folders[:i]:
            if _contains(one, other) or _contains(other, one):
                raise DataError(f"{one} and {other} must be two folders, neither inside the other")
    for folder in folders:
        check_unused(folder)
    try:
        for folder in folders:
            folder.make_dir()
        yield
    except BaseException as error:
        for folder in folders:
            with suppress(OSError):
                folder.remove()
        if isinstance(error, OSError):
            raise DataError(f"cannot write {' and '.join(map(str, folders))}: {error}") from None
        raise


def check_unused(folder: Location) -> None:
    """Raises DataError: there is something at `folder` already."""
    names = folder.names()
    if folder.exists() and not folder.is_dir():
        raise DataError(f"the output {folder} is a file, not a folder")
    if NAME in names:
        raise DataError(f"{folder} already holds encoded data: choose another folder or remove it")
    if names:
        raise DataError(
            f"{folder} is not empty (it holds {names[0]}): choose another folder, or remove it if it is what an "
            "interrupted encoding left behind"
        )


def _contains(outer: Location, inner: Location) -> bool:
    return str(outer) == str(inner) or str(inner).startswith(posixpath.join(str(outer), ""))
