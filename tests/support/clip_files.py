"""Videos for tests: a real clip, clips of digits from the tool that makes them, and files of any kind by FFmpeg."""

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from rdm_scale.encoding.videos import VideoMetadata, decode_clip, read_video_metadata
from rdm_scale.tools import make_digit_clips

BUNNY = Path(__file__).parent / "clips/big_buck_bunny.mp4"  # 50 frames, 25 a second, 320 x 180, key frames at 12 k


def digit_clip(index: int = 0, container: str = "mp4", frames: int = 24, size: int = 32, fps: int = 24) -> bytes:
    """The video of a moving digit, whose label is `digit_label(index)`."""
    scan = load_digits(return_X_y=True)[0][index].reshape(8, 8)
    return bytes(make_digit_clips.encode(make_digit_clips.render(scan, index, frames, size), container, fps))


def digit_label(index: int) -> int:
    return int(load_digits(return_X_y=True)[1][index])


def video(
    pictures: Sequence[np.ndarray],
    container: str = "mp4",
    codec: str = "libx264",
    *,
    rate: int = 24,
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    rotation: int = 0,
    pixel_aspect: Fraction | None = None,
) -> bytes:
    """Pictures uint8 [H, W, 3] as a video; `times` are milliseconds, for a variable frame rate."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=rate, options={"threads": "1", **(options or {})})
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], pixels
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        if pixel_aspect:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = (times[i], Fraction(1, 1000)) if times else (i, Fraction(1, rate))
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


def counting(frames: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Grey pictures, number i of brightness 8 i (up to 31), that `numbers` reads back; the top left quarter is red."""
    pictures = [np.full((height, width, 3), min(8 * i, 255), np.uint8) for i in range(frames)]
    for picture in pictures:
        picture[: height // 2, : width // 2] = (255, 0, 0)
    return pictures


def numbers(clip: Tensor) -> list[int]:
    """[3, T, H, W] of `counting` pictures to their numbers, by their last pixels."""
    return [round(value) for value in ((clip[1, :, -1, -1] + 1) * 127.5 / 8).tolist()]


def all_frames(content: bytes) -> Tensor:
    """[3, T, H, W] in [-1, 1] by a plain decode of the whole file."""
    with av.open(io.BytesIO(content)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1


def clip_of(content: bytes, start: int = 0, frames: int = 1, name: str = "a video", **options: Any) -> Tensor:
    defaults: dict[str, Any] = {"fps": None, "height": 48, "width": 64}
    return decode_clip(io.BytesIO(content), name, start=start, frames=frames, **defaults | options)


def metadata_of(content: bytes, fps: float | None = None) -> VideoMetadata:
    return read_video_metadata(io.BytesIO(content), "a video", fps)
