"""Video decoding: the size and length of a video, and clips of it as tensors of a given size.

Times count from the first frame. At a given frame rate, frame i is the one shown at time i / rate: the last one whose
presentation time is not later. A clip depends on its file and the arguments alone, not on what was decoded before.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from rdm_scale.encoding.images import ENLARGED
from rdm_scale.encoding.remarks import Remarks
from rdm_scale.encoding.video_frames import FrameConverter, frame_orientation, square_width
from rdm_scale.encoding.video_stream import DEFAULT_LIMITS, TOLERANCE, TimedFrame, VideoLimits, VideoStream, open_video
from rdm_scale.errors import DataError

__all__ = ["VideoLimits", "VideoMetadata", "decode_clip", "read_video_metadata"]

REPEATED = "frames repeated within a clip, since --fps is above the video's own rate or its frames are far apart"
_SECONDS_BACK = (
    0.0,
    10.0,
)  # before a clip, to seek a key frame; if both attempts fail, the file is decoded from its beginning


@dataclass(frozen=True, slots=True)
class VideoMetadata:
    """Length and size of a video."""

    frames: int  # at the frame rate `fps`
    height: int  # in square pixels, upright
    width: int
    fps: float


def read_video_metadata(
    file: BinaryIO, name: str, fps: float | None = None, limits: VideoLimits = DEFAULT_LIMITS
) -> VideoMetadata:
    """Read the length and size of a video from its container and its first frame.

    A file that does not state the length of its video (Matroska, WebM, a variable frame rate) is read to its end, but
    not decoded.

    Args:
        file: seekable file opened for reading; it stays open.
        name: name of the file, for error messages.
        fps: frame rate at which frames are counted; None: the average rate of the video.

    Raises:
        DataError: the container is not supported, the file is damaged, or it exceeds a limit.
        ValueError: the frame rate is impossible.
    """
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"impossible frame rate {fps}")
    with open_video(file, name, limits) as video:
        rate = float(fps if fps is not None else video.rate)
        first, seconds = video.first_frame_and_duration()
        frames = math.ceil((seconds - TOLERANCE) * rate)
        video.check_frames(frames)
        height, width = first.height, square_width(first.width, video.pixel_aspect)  # as stored
        if frame_orientation(first, name).transposed:
            height, width = width, height
        return VideoMetadata(max(1, frames), height, width, rate)


@dataclass(frozen=True)
class _Clip:
    """Frame numbers and size of a clip to decode."""

    fps: float | None
    numbers: range
    height: int
    width: int
    remarks: Remarks | None

    def times(self, video: VideoStream) -> list[float]:
        """Times of the frames, in seconds from the first frame of the video."""
        rate = self.fps or float(video.rate)
        return [number / rate for number in self.numbers]


def decode_clip(
    file: BinaryIO,
    name: str,
    *,
    fps: float | None,
    start: int,
    frames: int,
    height: int,
    width: int,
    stride: int = 1,
    limits: VideoLimits = DEFAULT_LIMITS,
    remarks: Remarks | None = None,
) -> Tensor:
    """Decode frames start, start + stride, ... of a video, float32 [3, frames, height, width] in [-1, 1].

    Frames are turned upright, resized with PIL's antialiased bicubic filter so that they just cover height x width,
    and center-cropped. Colors are converted to sRGB, high dynamic range is tone-mapped, and transparency is blended
    over white, as in images. Decoding starts at the last key frame before the clip. Several threads may decode clips
    at the same time, each with its own file object.

    Args:
        file: seekable file opened for reading; it stays open.
        name: name of the file, for error messages.
        fps: frame rate at which frames are counted; None: the average rate of the video.
        remarks: where to count that something the file states could not be used.

    Raises:
        DataError: the container or color space is not supported, the file is damaged, exceeds a limit, or ends before
            the clip does.
        ValueError: the clip is impossible.
    """
    if start < 0 or min(frames, height, width, stride) < 1 or (fps is not None and not 0 < fps < math.inf):
        raise ValueError(f"impossible clip: {start=} {frames=} {stride=} {height=} {width=} {fps=}")
    clip = _Clip(fps, range(start, start + frames * stride, stride), height, width, remarks)
    for back in _SECONDS_BACK:
        try:
            with open_video(file, name, limits) as video:
                pixels = _decode_after_seek(video, clip, back)
        except DataError:  # frames after a seek may depend on earlier ones: decoding from the beginning may succeed
            continue
        if pixels is not None:
            return pixels
    with open_video(file, name, limits) as video:
        return _collect(video, _choose(video.frames(), clip.times(video), name), clip)


def _decode_after_seek(video: VideoStream, clip: _Clip, back: float) -> Tensor | None:
    """Decode a clip from the last key frame at least `back` seconds before it; None if there is none."""
    times = clip.times(video)
    if times[0] <= back or not video.seekable:
        return None
    video.seek(times[0] - back)
    # Frames shown before the key frame may depend on frames that are stored before it.
    shown = itertools.dropwhile(lambda item: not item.frame.key_frame, video.frames())
    first = next(shown, None)
    if first is None or first.time > times[0] + TOLERANCE:
        return None
    return _collect(video, _choose(itertools.chain([first], shown), times, video.name), clip)


def _collect(video: VideoStream, chosen: Iterator[Any], clip: _Clip) -> Tensor:
    """Convert decoded frames to a clip, float32 [3, T, height, width] in [-1, 1]."""
    converter = FrameConverter(clip.height, clip.width, video.pixel_aspect, video.name, clip.remarks)
    pixels = np.empty((len(clip.numbers), clip.height, clip.width, 3), np.uint8)
    last, repeated = None, False
    for i, frame in enumerate(chosen):
        pixels[i] = pixels[i - 1] if frame is last else converter.convert(frame)
        repeated |= frame is last
        last = frame
    if clip.remarks is not None and repeated:
        clip.remarks.add(REPEATED, video.name)
    if clip.remarks is not None and converter.enlarged is not None:
        clip.remarks.add(ENLARGED, f"{video.name} ({converter.enlarged.height} x {converter.enlarged.width} pixels)")
    return torch.from_numpy(pixels).permute(3, 0, 1, 2).contiguous().float().div_(127.5).sub_(1)


def _choose(shown: Iterator[TimedFrame], times: Sequence[float], name: str) -> Iterator[Any]:
    """Yield the frame that is shown at each of `times` (ascending), decoding no further than the last of them.

    A time before the first frame gets the first frame.
    """
    wanted = 0
    before, end = None, 0.0
    for time, duration, frame in shown:
        while time > times[wanted] + TOLERANCE:
            yield before if before is not None else frame
            wanted += 1
            if wanted == len(times):
                return
        while time >= times[wanted] - TOLERANCE:  # without waiting, since the next frame is later than that
            yield frame
            wanted += 1
            if wanted == len(times):
                return
        before, end = frame, time + duration
    while before is not None and wanted < len(times) and times[wanted] + TOLERANCE < end:
        yield before
        wanted += 1
    if wanted < len(times):
        raise DataError(
            f"the video {name} ends at {end:.3f} s, before the frame at {times[wanted]:.3f} s: it is truncated, or "
            "states a longer duration than it has; repair or remove it"
        )
