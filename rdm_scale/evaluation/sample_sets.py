"""Sets of images or clips to measure: arrays, folders, tars and lists of media, and latent sets through their codec.

All of them give uint8 pixels, as image files hold them. Shapes: N samples, B samples of a batch, T frames (1 for
images), H height, W width.
"""

import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rdm_scale import rng
from rdm_scale.errors import ConfigError, DataError
from rdm_scale.storage.location import Location

if TYPE_CHECKING:
    from rdm_scale.encoding.media import MediaFile

READERS = 8  # threads that decode media
DEFAULT_FRAMES = 16
MANIFEST = "manifest.json"
_PASS_BATCH = 256  # samples of a batch where only pixels are wanted


class PixelSize(NamedTuple):
    """Frames, height and width of samples."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class MediaOptions:
    """Reading of images and videos.

    Attributes:
        size: height and width in pixels, cropped and resized as for encoding; None: the files' own, which must agree.
        frames: frames of a clip, from the beginning of each video.
        stride: frame stride of a clip.
        fps: frames a second at which frames are counted; None: the video's own.
    """

    size: tuple[int, int] | None = None
    frames: int = DEFAULT_FRAMES
    stride: int = 1
    fps: float | None = None


class SampleBatch(NamedTuple):
    """Samples of a set: their positions int64 [B] and uint8 pixels [B, T, H, W, 3]."""

    indices: Tensor
    pixels: Tensor


class SampleSet(ABC):
    """Images or clips of one size.

    Attributes:
        name: where they come from, for messages.
        count: number N of samples.
        size: their frames, height and width.
        stride: frame stride with which clips were read; 1 if nothing is known.
        captions: one for each sample, if there are any.
    """

    name: str
    count: int
    size: PixelSize
    stride = 1
    captions: tuple[str, ...] | None = None

    @abstractmethod
    def batches(self, batch_size: int, rank: int = 0, ranks: int = 1) -> Iterator[SampleBatch]:
        """This rank's samples; over all ranks each sample comes exactly once."""

    def pixels_at(self, positions_n: Tensor) -> Tensor:
        """Pixels uint8 [n, T, H, W, 3] of the samples at these ascending positions."""
        batches = self.batches(_PASS_BATCH)
        return torch.cat([batch.pixels[torch.isin(batch.indices, positions_n)] for batch in batches])


def to_uint8(pixels_BCTHW: Tensor) -> Tensor:
    """Pixels [B, 3, T, H, W] in [-1, 1] as uint8 [B, T, H, W, 3], rounded as image files are.

    Raises:
        DataError: a pixel is NaN.
    """
    if pixels_BCTHW.isnan().any():
        raise DataError("generated pixels hold NaN: the weights of this model have diverged; use an earlier checkpoint")
    return ((pixels_BCTHW.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1)


def to_float(pixels_BTHWC: Tensor) -> Tensor:
    """Pixels uint8 [B, T, H, W, 3] as float32 [B, 3, T, H, W] in [-1, 1]."""
    return pixels_BTHWC.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def open_samples(url: str, options: MediaOptions | None = None, device: str | torch.device = "cpu") -> SampleSet:
    """Open a set of images or clips.

    Args:
        url: a `.npy` or `.npz` of uint8 [N, H, W, 3] or [N, T, H, W, 3]; a folder, tar or list of images or videos; or
            a latent set (its folder or manifest.json). On any fsspec file system.
        device: device of the codec of a latent set.

    Raises:
        DataError: there is no such set, it is empty, or its samples have another type or different sizes.
    """
    if url.endswith((".npy", ".npz")):
        return ArraySamples(read_array(url), url)
    location = Location(url)
    if location.name == MANIFEST or (location / MANIFEST).exists():
        return LatentSamples(url if location.name == MANIFEST else str(location / MANIFEST), device)
    return MediaSamples(url, options or MediaOptions())


def read_array(url: str, key: str = "arr_0") -> NDArray[np.generic]:
    """Array of a `.npy` file, or the one named `key` (else the only one) of a `.npz` archive.

    Raises:
        DataError: the file cannot be read or is no such array.
    """
    try:
        with Location(url).open() as file:
            found = np.load(file, allow_pickle=False)
            if isinstance(found, np.ndarray):
                return found
            if key not in found.files and len(found.files) != 1:
                raise DataError(f"{url} holds the arrays {', '.join(found.files)}, and none of them is {key}")
            return np.asarray(found[key if key in found.files else found.files[0]])
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read the array {url}: {error}") from None


def kept_rows(positions_B: Tensor, count: int) -> Tensor:
    """Rows of the `count` samples that are kept of those at these positions, in the order of the positions.

    They are those of the lowest keys, which depend on the position only. The first samples of a folder would all be of
    its first classes. What is kept of parts of a set, and then of all parts, is what is kept of the set at once.
    """
    keys = torch.tensor([rng.key(0, "kept samples", position) for position in positions_B.tolist()], dtype=torch.int64)
    rows = keys.argsort()[:count]
    return rows[positions_B[rows].argsort()]


def kept_images(samples: SampleSet, count: int) -> NDArray[np.uint8]:
    """Images of a set, uint8 [n, H, W, 3], chosen by key; fewer if the set has fewer.

    Raises:
        ConfigError: the set holds clips.
    """
    if samples.size.frames > 1:
        raise ConfigError(f"{samples.name} holds clips, of which no single images are kept (--images)")
    return samples.pixels_at(kept_rows(torch.arange(samples.count), count))[:, 0].numpy()


class ArraySamples(SampleSet):
    """Samples of an array uint8 [N, H, W, 3] or [N, T, H, W, 3]."""

    def __init__(self, array: NDArray[np.generic], name: str) -> None:
        if array.dtype != np.uint8 or array.ndim not in (4, 5) or array.shape[-1] != 3:
            raise DataError(
                f"{name} holds {array.dtype} {list(array.shape)}: images are uint8 [N, H, W, 3], clips uint8 "
                "[N, T, H, W, 3], and features float [N, D] need --features identity"
            )
        if not array.size:
            raise DataError(f"{name} holds no samples: its shape is {list(array.shape)}")
        self.array = array if array.ndim == 5 else array[:, None]
        self.name, self.count = name, len(array)
        self.size = PixelSize(*self.array.shape[1:4])

    def batches(self, batch_size: int, rank: int = 0, ranks: int = 1) -> Iterator[SampleBatch]:
        for part in _blocks(self.count, batch_size, rank, ranks):
            yield SampleBatch(torch.arange(part.start, part.stop), torch.from_numpy(np.array(self.array[part])))


class MediaSamples(SampleSet):
    """Images, or the first clip of each video, of a folder, tar or list.

    Attributes:
        labels: class of each sample; -1 without classes.
        class_names: names of the classes.
    """

    def __init__(self, url: str, options: MediaOptions) -> None:
        from rdm_scale.encoding.inputs import find_media

        media = find_media(url)
        self.name, self.count, self.options = url, len(media.files), options
        self.files, self.is_video = media.files, media.kind == "video"
        self.labels, self.class_names = [file.label for file in media.files], media.class_names
        self.captions = tuple(file.caption or "" for file in media.files) if media.captioned else None
        height, width = options.size or self._own_size(media.files[0])
        self.size = PixelSize(options.frames if self.is_video else 1, height, width)
        self.stride = options.stride if self.is_video else 1

    def batches(self, batch_size: int, rank: int = 0, ranks: int = 1) -> Iterator[SampleBatch]:
        with ThreadPoolExecutor(READERS) as pool:
            for part in _blocks(self.count, batch_size, rank, ranks):
                pixels = torch.stack(list(pool.map(self._read, self.files[part])))
                yield SampleBatch(torch.arange(part.start, part.start + len(pixels)), to_uint8(pixels))

    def pixels_at(self, positions_n: Tensor) -> Tensor:  # without a pass over all files
        with ThreadPoolExecutor(READERS) as pool:
            files = [self.files[position] for position in positions_n.tolist()]
            return torch.cat(list(pool.map(lambda file: to_uint8(self._read(file)[None]), files)))

    def _own_size(self, file: "MediaFile") -> tuple[int, int]:
        from rdm_scale.encoding.images import image_size
        from rdm_scale.encoding.videos import read_video_metadata

        if not self.is_video:
            found = image_size(file.read(), file.name)
            return found.height, found.width
        with file.open() as content:
            video = read_video_metadata(content, file.name, self.options.fps)
            return video.height, video.width

    def _read(self, file: "MediaFile") -> Tensor:
        """Pixels [3, T, H, W] in [-1, 1]."""
        from rdm_scale.encoding.images import decode
        from rdm_scale.encoding.videos import decode_clip

        frames, height, width = self.size
        if self.options.size is None and (own := self._own_size(file)) != (height, width):
            raise DataError(
                f"{file.name} has {own[0]} x {own[1]} pixels, and the first of {self.name} has {height} x {width}: "
                "give --size to crop and resize all of them"
            )
        if not self.is_video:
            return decode(file.read(), height, width, file.name).unsqueeze(1)
        with file.open() as content:
            return decode_clip(
                content,
                file.name,
                fps=self.options.fps,
                start=0,
                frames=frames,
                height=height,
                width=width,
                stride=self.options.stride,
            )


class LatentSamples(SampleSet):
    """Samples of a latent set, decoded by its codec: what a perfect model of these latents would draw."""

    def __init__(self, manifest: str, device: str | torch.device) -> None:
        from rdm_scale.codecs import codec_of
        from rdm_scale.data.manifest import read_manifest

        found, _ = read_manifest(manifest)
        if len(found.buckets) > 1:
            raise DataError(
                f"{manifest} holds latents of {len(found.buckets)} sizes: measure one size, or the media themselves "
                "with --size"
            )
        self.name, self.count, self._manifest = manifest, found.samples, manifest
        self._codec = codec_of(found.codec, device)
        (shape,) = found.buckets
        geometry = self._codec.geometry
        self.size = PixelSize(geometry.frames(shape[1]), shape[2] * geometry.spatial, shape[3] * geometry.spatial)

    def batches(self, batch_size: int, rank: int = 0, ranks: int = 1) -> Iterator[SampleBatch]:
        from rdm_scale.data.held_out import HeldOut

        held_out = HeldOut(self._manifest, self.count, batch_size=batch_size, dp_rank=rank, dp_size=ranks)
        try:
            for batch, weights in held_out:
                real = weights > 0  # the others fill the last batch and are samples that were read before
                if real.any():
                    yield SampleBatch(batch.positions[real], to_uint8(self._codec.decode(batch.latents[real]).cpu()))
        finally:
            held_out.close()


def _blocks(count: int, batch_size: int, rank: int, ranks: int) -> Iterator[slice]:
    """Slices of `batch_size` samples that ranks take in turns."""
    for first in range(rank * batch_size, count, ranks * batch_size):
        yield slice(first, min(first + batch_size, count))
