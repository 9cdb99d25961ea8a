"""From found files to pixels: images and clips alike, of one size and in batches."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from rdm_scale.codecs import LatentCodec, normalize
from rdm_scale.encoding.images import decode, image_size
from rdm_scale.encoding.inputs import Kind, MediaFile, MediaSet
from rdm_scale.encoding.planning import Bucket, Item, Probe, Settings
from rdm_scale.encoding.videos import decode_clip, probe_video

READERS = 8  # threads that read and decode


def probe(file: MediaFile, kind: Kind, fps: float | None) -> Probe:
    """The size of an image or video. Raises DataError: it cannot be read, or is none."""
    if kind == "image":
        return Probe(1, *image_size(file.read(), file.name))
    with file.open() as content:
        found = probe_video(content, file.name, fps)
    return Probe(found.frames, found.height, found.width)


def load(source: MediaSet, item: Item, bucket: Bucket, settings: Settings) -> Tensor:
    """A sample's pixels, float32 [3, T, H, W] in [-1, 1].

    Raises DataError: its file cannot be read or decoded, or ends too early.
    """
    file = source.files[item.file]
    pixels = _load(file, source.kind, bucket, item.clip * settings.clip_starts(bucket), settings)
    return pixels.flip(-1) if item.view else pixels


def _load(file: MediaFile, kind: Kind, bucket: Bucket, start: int, settings: Settings) -> Tensor:
    if kind == "image":
        return decode(file.read(), bucket.height, bucket.width, file.name).unsqueeze(1)
    with file.open() as content:
        return decode_clip(
            content,
            file.name,
            fps=settings.fps,
            start=start,
            frames=bucket.frames,
            height=bucket.height,
            width=bucket.width,
            stride=settings.stride,
        )


def load_batches(
    files: Sequence[MediaFile], size: int, batch_size: int
) -> Iterator[tuple[Sequence[MediaFile], Tensor]]:
    """Batches of images with their pixels [B, 3, size, size] in [-1, 1]. Raises DataError: one cannot be decoded."""
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(files), batch_size):
            batch = files[start : start + batch_size]
            yield batch, torch.stack(list(pool.map(lambda file: decode(file.read(), size, size, file.name), batch)))


def reconstruct(pixels: Tensor, codec: LatentCodec) -> Tensor:
    """What the codec makes of pixels [B, 3, T, H, W] by way of its latents' mode, on the CPU."""
    modes = codec.encode(pixels)[:, : codec.channels]
    return codec.decode(normalize(modes, codec.record)).cpu()
