"""Pixels of samples: images and clips loaded at the size of a bucket, and their reconstructions by a codec."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from rdm_scale.codecs import LatentCodec, normalize
from rdm_scale.encoding.images import ENLARGED, decode, image_size, is_enlarged
from rdm_scale.encoding.inputs import MediaFile, MediaSet
from rdm_scale.encoding.media import MediaKind
from rdm_scale.encoding.planning import EncodingSettings, MediaMetadata, PixelBucket, PlannedSample, too_small
from rdm_scale.encoding.rejections import Rejection, RejectionPolicy, TooSmallError
from rdm_scale.encoding.remarks import Remarks
from rdm_scale.encoding.videos import decode_clip, read_video_metadata
from rdm_scale.errors import DataError

READERS = 8  # threads that read and decode
DECODING_VERSION = 2  # raised when the same file gives other pixels, or is accepted where it was refused


def read_metadata(file: MediaFile, kind: MediaKind, fps: float | None) -> MediaMetadata:
    """Read the size of an image or video.

    Args:
        fps: frame rate at which the frames of a video are counted; None: that of the video.

    Raises:
        DataError: the file cannot be read, or is not an image or video.
    """
    if kind == "image":
        return MediaMetadata(1, *image_size(file.read(), file.name))
    with file.opened() as content:
        found = read_video_metadata(content, file.name, fps)
    return MediaMetadata(found.frames, found.height, found.width)


def load_sample(
    source: MediaSet,
    sample: PlannedSample,
    bucket: PixelBucket,
    settings: EncodingSettings,
    remarks: Remarks | None = None,
) -> Tensor:
    """Load the pixels of a sample, float32 [3, T, H, W] in [-1, 1].

    Args:
        remarks: where to count what could not be used.

    Raises:
        DataError: the file cannot be read or decoded, or ends before the clip does.
    """
    file = source.files[sample.file]
    if source.kind == "image":
        content = file.read()
        size = image_size(content, file.name)
        if small := too_small(file.name, *size, settings.min_size):
            raise TooSmallError(small)
        pixels = decode(content, bucket.height, bucket.width, file.name, remarks).unsqueeze(1)
        if remarks is not None and is_enlarged(*size, bucket.height, bucket.width):
            remarks.add(ENLARGED, f"{file.name} ({size.height} x {size.width} pixels)")
    else:
        pixels = _load_clip(file, sample.clip * settings.clip_interval(bucket), bucket, settings, remarks)
    return pixels.flip(-1) if sample.view else pixels


def _load_clip(
    file: MediaFile, start: int, bucket: PixelBucket, settings: EncodingSettings, remarks: Remarks | None
) -> Tensor:
    with file.opened() as content:
        return decode_clip(
            content,
            file.name,
            fps=settings.fps,
            start=start,
            frames=bucket.frames,
            height=bucket.height,
            width=bucket.width,
            stride=settings.stride,
            remarks=remarks,
        )


class ImageSelection(NamedTuple):
    """Images that can be decoded, and the others with the reason why not."""

    usable: list[MediaFile]
    rejected: list[tuple[MediaFile, Rejection]]
    remarks: Remarks


def select_decodable(files: Sequence[MediaFile], progress: Callable[[int], object]) -> ImageSelection:
    """Decode all images once, to set aside those that encoding would reject.

    Args:
        progress: called after each image, with 1.

    Raises:
        StorageError: an image cannot be read from where it is stored.
    """
    policy = RejectionPolicy(len(files), max_unreadable=0.0)

    def look(file: MediaFile) -> Rejection | Remarks:
        remarks = Remarks()
        try:
            decode(file.read(), 1, 1, file.name, remarks)
        except DataError as error:
            return policy.reject(error, file)
        return remarks

    selection = ImageSelection([], [], Remarks())
    with ThreadPoolExecutor(READERS) as pool:
        for file, found in zip(files, pool.map(look, files), strict=True):
            if isinstance(found, Rejection):
                selection.rejected.append((file, found))
            else:
                selection.usable.append(file)
                selection.remarks.include(found.found)
            progress(1)
    return selection


class ImageBatch(NamedTuple):
    """Decoded square images with the files that they came from."""

    files: Sequence[MediaFile]
    pixels: Tensor  # [B, 3, size, size] in [-1, 1]


def load_image_batches(files: Sequence[MediaFile], size: int, batch_size: int) -> Iterator[ImageBatch]:
    """Load batches of square images. Raises DataError: a file cannot be read or decoded."""
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(files), batch_size):
            batch = files[start : start + batch_size]
            images = pool.map(lambda file: decode(file.read(), size, size, file.name), batch)
            yield ImageBatch(batch, torch.stack(list(images)))


def reconstruct(pixels: Tensor, codec: LatentCodec) -> Tensor:
    """Encode pixels [B, 3, T, H, W] and decode the mode of their latents, on the CPU."""
    modes = codec.encode(pixels)[:, : codec.channels]
    return codec.decode(normalize(modes, codec.record)).cpu()
