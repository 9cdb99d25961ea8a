"""Videos: how long and large a file is, and clips of it as tensors of one size, through PyAV (FFmpeg).

Time counts from the first frame. Frame i of a video at a frame rate is the one shown at i / rate: the last whose own
time is not later. A clip is a function of its file and the arguments alone, whatever was decoded before it.

Files are untrusted: they are read through a file object, never by name, so that no playlist can make FFmpeg open
another file or an address; the containers and the size of a frame are bounded, and damage is an error, not grey blocks.
"""

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rdm_scale.encoding.images import centre_box
from rdm_scale.errors import DataError

EXTENSIONS = ("mp4", "avi", "webm", "mkv", "mov")
_MAX_FILE_BYTES = 2**36
_MAX_PIXELS = 2**26  # 8192 x 8192: a decoder holds up to 17 such frames
_MAX_FRAMES = 2**24  # more than six days at 30 frames a second
_TOO_MANY_FRAMES = f"{{}} claims to have {{}} frames: at most {_MAX_FRAMES} are taken; split it"
_TOLERANCE = 1e-3  # seconds: Matroska rounds times to milliseconds, so an exact frame may seem to be late
_STEPS_BACK = (0.0, 10.0)  # seconds before a clip to look for a key frame, before going through all of the file
_MOV_ATOMS = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"uuid", b"junk")
# The second one also holds for the pictures that FFmpeg decodes to find out what a stream is.
_FORMAT_OPTIONS = {"protocol_whitelist": "none", "max_pixels": str(_MAX_PIXELS)}
_DECODER_OPTIONS = {"max_pixels": str(_MAX_PIXELS), "err_detect": "explode"}


@dataclass(frozen=True, slots=True)
class VideoSize:
    frames: int  # at the frame rate `fps`
    height: int  # pixels as shown: upright, and square
    width: int
    fps: float


def probe_video(file: BinaryIO, name: str, fps: float | None = None) -> VideoSize:
    """How many frames of which size a video has, from what its container says and its first frame.

    A file that does not say how long its video is (Matroska, WebM, a variable frame rate) is read to its end, but not
    decoded.

    Args:
        file: opened for reading, seekable; it stays open.
        name: for messages.
        fps: frames a second wanted; None: the file's own (average) rate.

    Raises:
        DataError: no video of a known container, damaged, or beyond the limits on size; the message holds `name`.
        ValueError: an impossible frame rate is asked for.
    """
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"impossible frame rate {fps}")
    with _opened(file, name) as (container, stream):
        rate = _own_rate(stream, name)
        first, seconds = None, _stated_duration(stream, rate, name)
        start, end = _start(stream), 0.0
        for packet in container.demux(stream):
            stamp = packet.dts if _is_avi(container) else packet.pts
            if stamp is not None and not packet.is_discard:
                end = max(end, float((stamp - start) * packet.time_base) + _duration(packet, rate))
            if first is None:
                first = next(iter(packet.decode()), None)
            if first is not None and seconds is not None:
                break
        if first is None:
            raise DataError(f"cannot decode the video {name}: it has no frames; repair or remove it")
        turned = _quarter_turns(first) % 2
        height, width = first.height, max(1, round(first.width * _pixel_aspect(stream)))  # as in the file
    wanted = float(fps if fps is not None else rate)
    frames = math.ceil(((end if seconds is None else seconds) - _TOLERANCE) * wanted)
    if frames > _MAX_FRAMES:
        raise DataError(_TOO_MANY_FRAMES.format(name, frames))
    return VideoSize(max(1, frames), *((width, height) if turned else (height, width)), wanted)


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
) -> Tensor:
    """Frames number start, start + stride, ... of a video at a frame rate, float32 [3, frames, height, width].

    Values are in [-1, 1]. The picture is turned upright, resized with PIL's antialiased bicubic filter so that it just
    covers height x width, and cut to that size around its centre. Decoding starts at the last key frame before the
    clip. Several threads may decode clips at the same time, each through a file object of its own.

    Args:
        file: opened for reading, seekable; it stays open.
        name: for messages.
        fps: frames a second that are counted; None: the file's own (average) rate.

    Raises:
        DataError: as `probe_video`, or a frame of the clip is damaged or beyond the end; the message holds `name`.
        ValueError: an impossible clip is asked for.
    """
    if start < 0 or min(frames, height, width, stride) < 1 or (fps is not None and not 0 < fps < math.inf):
        raise ValueError(f"impossible clip: {start=} {frames=} {stride=} {height=} {width=} {fps=}")
    numbers = range(start, start + frames * stride, stride)
    for back in _STEPS_BACK:
        try:
            clip = _decode(file, name, fps, numbers, height, width, back)
        except DataError:  # a seek may land among frames that need others: from the beginning they may be fine
            continue
        if clip is not None:
            return clip
    clip = _decode(file, name, fps, numbers, height, width, None)
    assert clip is not None  # no frame comes before the first one
    return clip


def _decode(
    file: BinaryIO, name: str, fps: float | None, numbers: Sequence[int], height: int, width: int, back: float | None
) -> Tensor | None:
    """The clip, decoded from a key frame `back` seconds or more before it; None: there is none, or not early enough.

    With back=None it is decoded from the beginning.
    """
    with _opened(file, name) as (container, stream):
        rate = fps or float(_own_rate(stream, name))
        times = [number / rate for number in numbers]
        if back is not None:
            if times[0] <= back or (_is_avi(container) and stream.codec_context.has_b_frames):
                return None
            _seek(container, stream, times[0] - back)
        shown = _timed(container, stream, name)
        if back is not None:
            # Pictures before the key frame in the order of showing may lean on those before it in the file.
            shown = itertools.dropwhile(lambda item: not item[2].key_frame, shown)
            first = next(shown, None)
            if first is None or first[0] > times[0] + _TOLERANCE:
                return None
            shown = itertools.chain([first], shown)
        return _collect(_choose(shown, times, name), len(times), height, width, _pixel_aspect(stream))


def _collect(chosen: Iterator[Any], frames: int, height: int, width: int, pixel_aspect: float) -> Tensor:
    """Frames as FFmpeg has them to [3, frames, height, width] in [-1, 1]."""
    from av.video.reformatter import VideoReformatter

    reformatter = VideoReformatter()
    clip = np.empty((frames, height, width, 3), np.uint8)
    last = None
    for i, frame in enumerate(chosen):
        if frame is last:
            clip[i] = clip[i - 1]
            continue
        rgb = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        clip[i] = _fit(rgb, height, width, _quarter_turns(frame), pixel_aspect)
        last = frame
    return torch.from_numpy(clip).permute(3, 0, 1, 2).contiguous().float().div_(127.5).sub_(1)


def _fit(rgb: np.ndarray, height: int, width: int, quarter_turns: int, pixel_aspect: float) -> np.ndarray:
    """[H, W, 3] to [height, width, 3]: turned upright, then cut and resized as images.decode does."""
    if quarter_turns % 2:
        pixel_aspect = 1 / pixel_aspect
    image = Image.fromarray(np.ascontiguousarray(np.rot90(rgb, quarter_turns)))
    left, top, right, bottom = centre_box(image.height, max(1, round(image.width * pixel_aspect)), height, width)
    stretch = image.width / max(1, round(image.width * pixel_aspect))
    box = (left * stretch, top, min(right * stretch, image.width), bottom)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))


def _choose(shown: Iterator[tuple[float, float, Any]], times: Sequence[float], name: str) -> Iterator[Any]:
    """For each of `times` (ascending) the frame shown then, of frames given with their time and duration.

    Stops as soon as it has the last one. A time before the first frame gets the first frame.
    """
    wanted = 0
    before, end = None, 0.0
    for time, duration, frame in shown:
        while time > times[wanted] + _TOLERANCE:
            yield before if before is not None else frame
            wanted += 1
            if wanted == len(times):
                return
        while time >= times[wanted] - _TOLERANCE:  # at once, since the next frame is later than that
            yield frame
            wanted += 1
            if wanted == len(times):
                return
        before, end = frame, time + duration
    while before is not None and wanted < len(times) and times[wanted] + _TOLERANCE < end:
        yield before
        wanted += 1
    if wanted < len(times):
        raise DataError(
            f"the video {name} ends at {end:.3f} s, before the frame at {times[wanted]:.3f} s: it is cut short, or "
            "says that it is longer than it is; repair or remove it"
        )


def _timed(container: Any, stream: Any, name: str) -> Iterator[tuple[float, float, Any]]:
    """(time, duration, frame) in the order of showing, in seconds from the first frame of the video."""
    rate, start = float(_own_rate(stream, name)), _start(stream)
    places: deque[int] = deque()
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise DataError(f"cannot decode the video {name}: it is damaged or cut short; repair or remove it")
        if packet.dts is not None:
            places.append(packet.dts)
        for frame in packet.decode():
            if frame.is_corrupt:
                raise DataError(f"cannot decode the video {name}: a frame is damaged; repair or remove it")
            place = places.popleft() if places else None
            # AVI has no times of showing, and those that FFmpeg makes up are wrong when frames are reordered. But the
            # frames take, in the order of showing, the places that the packets have in the file.
            stamp = place if _is_avi(container) or frame.pts is None else frame.pts
            if stamp is None:
                raise DataError(f"cannot decode the video {name}: a frame has no time; convert or remove it")
            yield float((stamp - start) * stream.time_base), _duration(frame, rate), frame


@contextmanager
def _opened(file: BinaryIO, name: str) -> Iterator[tuple[Any, Any]]:
    """The container, from its beginning, and its video stream. What goes wrong inside is raised as DataError."""
    import av
    import av.error

    try:
        kind = _container(file, name)
        with av.open(file, mode="r", format=kind, options=_FORMAT_OPTIONS, metadata_errors="replace") as container:
            streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
            if not streams:
                raise DataError(f"{name} holds no video stream; remove it")
            stream = streams[0]
            if stream.codec_context is None:
                raise DataError(f"the video {name} is compressed in a way that this FFmpeg cannot decode; convert it")
            if stream.width * stream.height > _MAX_PIXELS:
                raise DataError(
                    f"{name} has frames of {stream.width} x {stream.height} pixels; at most {_MAX_PIXELS} are decoded"
                )
            stream.codec_context.options = _DECODER_OPTIONS
            stream.codec_context.thread_count = 1  # callers decode several clips at a time instead
            yield container, stream
    except DataError:
        raise
    except (av.error.FFmpegError, ValueError, ArithmeticError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot decode the video {name}: {reason}; repair or remove it") from None
    except OSError as error:
        raise DataError(f"cannot read {name}: {error}") from None


def _container(file: BinaryIO, name: str) -> str:
    """FFmpeg's name of the container, by the first bytes; without one FFmpeg would try all that it knows."""
    if (size := file.seek(0, 2)) > _MAX_FILE_BYTES:
        raise DataError(f"{name} has {size} bytes: too large for a video; split it")
    file.seek(0)
    head = file.read(12)
    file.seek(0)
    if head[4:8] in _MOV_ATOMS:
        return "mp4"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    raise DataError(f"{name} is no video file of a known kind ({', '.join(EXTENSIONS)}): convert or remove it")


def _is_avi(container: Any) -> bool:
    return bool(container.format.name == "avi")


def _seek(container: Any, stream: Any, seconds: float) -> None:
    container.seek(_start(stream) + math.floor(seconds / stream.time_base), stream=stream)


def _start(stream: Any) -> int:
    """Time of the first frame, in the time base of the stream."""
    return int(stream.start_time or 0)


def _own_rate(stream: Any, name: str) -> Any:
    """Frames a second, a Fraction."""
    for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate):
        if rate:
            return rate
    raise DataError(f"{name} does not say how many frames a second it has: convert it, or give a frame rate")


def _stated_duration(stream: Any, rate: Any, name: str) -> float | None:
    """Seconds by the container's index; None when there is none of all frames, or the frames do not come regularly.

    Where they do not, the index has only the times of decoding, which say little about when the last one ends. The
    duration that a container states may be that of the sound.
    """
    if stream.frames > _MAX_FRAMES:
        raise DataError(_TOO_MANY_FRAMES.format(name, stream.frames))
    entries = stream.index_entries
    if not stream.frames or len(entries) != stream.frames:
        return None
    steps = np.diff(np.fromiter((entry.timestamp for entry in entries), np.int64, len(entries)))
    if len(steps) and float((steps.max() - steps.min()) * stream.time_base) > _TOLERANCE:
        return None
    return float(stream.frames / rate)


def _duration(item: Any, rate: Any) -> float:
    """Seconds that a packet or frame is shown."""
    return max(float((item.duration or 0) * item.time_base), 1 / float(rate))


def _quarter_turns(frame: Any) -> int:
    """Counterclockwise, as numpy.rot90 takes them, to show the frame upright."""
    return round(frame.rotation / 90) % 4


def _pixel_aspect(stream: Any) -> float:
    """Width of a pixel over its height; 1 where a file says nothing or nonsense."""
    ratio = float(stream.sample_aspect_ratio or 1)
    return ratio if 1 / 8 < ratio < 8 else 1.0
