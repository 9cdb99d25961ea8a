"""Video streams: untrusted files opened with PyAV (FFmpeg), and their frames with times.

Files are read through a file object, never by name, so that no playlist can make FFmpeg open another file or address.
Containers and frame sizes are bounded, and damage is an error instead of gray blocks.
"""

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from rdm_scale.encoding.media import EXTENSIONS
from rdm_scale.errors import DataError

TOLERANCE = 1e-3  # seconds: Matroska rounds times to milliseconds, so a frame may appear to be late
_MOV_ATOMS = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"uuid", b"junk")


_LIBVPX = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


class VideoLimits(NamedTuple):
    """Limits on the videos that are decoded."""

    file_bytes: int = 2**36
    pixels: int = 2**26  # of a frame, 8192 x 8192: a decoder holds up to 17 of them
    frames: int = 2**24  # more than six days at 30 frames a second


DEFAULT_LIMITS = VideoLimits()


class TimedFrame(NamedTuple):
    """A decoded frame with its presentation time and duration, in seconds from the first frame of the video."""

    time: float
    duration: float
    frame: Any  # av.VideoFrame


class VideoStream:
    """The first video stream of a file, as opened by `open_video`.

    Attributes:
        name: name of the file, for error messages.
        limits: limits that the file is checked against.
    """

    def __init__(self, container: Any, stream: Any, decoder: Any, name: str, limits: VideoLimits) -> None:
        self.name, self.limits = name, limits
        self._container, self._stream, self._decoder = container, stream, decoder

    @property
    def rate(self) -> Fraction:
        """Average number of frames per second. Raises DataError: the file does not state it."""
        for rate in (self._stream.average_rate, self._stream.guessed_rate, self._stream.base_rate):
            if rate:
                return Fraction(rate)
        raise DataError(f"{self.name} does not state its frame rate: convert it, or give a frame rate")

    @property
    def pixel_aspect(self) -> float:
        """Width of a pixel over its height; 1 if the file states no plausible ratio."""
        ratio = float(self._stream.sample_aspect_ratio or 1)
        return ratio if 1 / 8 < ratio < 8 else 1.0

    @property
    def seekable(self) -> bool:
        """False for AVI with B-frames, whose frames have no presentation times."""
        return not (self._is_avi and self._stream.codec_context.has_b_frames)

    def seek(self, seconds: float) -> None:
        """Seek to the last key frame at or before `seconds`."""
        self._container.seek(self._start + math.floor(seconds / self._stream.time_base), stream=self._stream)
        self._decoder.flush_buffers()

    def frames(self) -> Iterator[TimedFrame]:
        """Decode all frames from the current position on, in presentation order.

        Raises:
            DataError: a frame is damaged, or has no time.
        """
        rate = self.rate
        packet_times: deque[int] = deque()
        for packet in self._container.demux(self._stream):
            if packet.is_corrupt:
                raise DataError(f"cannot decode the video {self.name}: it is damaged or truncated; repair or remove it")
            if packet.dts is not None:
                packet_times.append(packet.dts)
            for frame in self._decoder.decode(packet):
                if frame.is_corrupt:
                    raise DataError(f"cannot decode the video {self.name}: a frame is damaged; repair or remove it")
                packet_time = packet_times.popleft() if packet_times else None
                # AVI has no presentation times, and those that FFmpeg derives are wrong when frames are reordered. But
                # in presentation order the frames take the times that the packets have in file order.
                stamp = packet_time if self._is_avi or frame.pts is None else frame.pts
                if stamp is None:
                    raise DataError(f"cannot decode the video {self.name}: a frame has no time; convert or remove it")
                time = float((stamp - self._start) * self._stream.time_base)
                yield TimedFrame(time, _duration(frame, rate), frame)

    def first_frame_and_duration(self) -> tuple[Any, float]:
        """Decode the first frame, and find the duration of the video in seconds.

        A file without a complete index of regular frames (Matroska, WebM, a variable frame rate) is read to its end,
        but not decoded.

        Raises:
            DataError: there is no frame.
        """
        rate = self.rate
        first, seconds, end = None, self._indexed_duration(rate), 0.0
        for packet in self._container.demux(self._stream):
            stamp = packet.dts if self._is_avi else packet.pts
            if stamp is not None and not packet.is_discard:
                end = max(end, float((stamp - self._start) * packet.time_base) + _duration(packet, rate))
            if first is None:
                first = next(iter(self._decoder.decode(packet)), None)
            if first is not None and seconds is not None:
                break
        if first is None:
            raise DataError(f"cannot decode the video {self.name}: it has no frames; repair or remove it")
        return first, end if seconds is None else seconds

    def check_frames(self, frames: int) -> None:
        """Raise DataError if the video claims to have more frames than the limit."""
        if frames > self.limits.frames:
            raise DataError(
                f"{self.name} claims to have {frames} frames: at most {self.limits.frames} are supported; split it"
            )

    def _indexed_duration(self, rate: Fraction) -> float | None:
        """Duration by the container's index; None if it does not list all frames, or they are not equally spaced.

        With a variable frame rate the index has only decoding times, which do not give the end of the last frame. The
        duration that a container states may be that of the sound.
        """
        stream = self._stream
        self.check_frames(stream.frames)
        entries = stream.index_entries
        if not stream.frames or len(entries) != stream.frames:
            return None
        steps = np.diff(np.fromiter((entry.timestamp for entry in entries), np.int64, len(entries)))
        if len(steps) and float((steps.max() - steps.min()) * stream.time_base) > TOLERANCE:
            return None
        return float(stream.frames / rate)

    @property
    def _is_avi(self) -> bool:
        return bool(self._container.format.name == "avi")

    @property
    def _start(self) -> int:
        """Time of the first frame, in the time base of the stream."""
        return int(self._stream.start_time or 0)


@contextmanager
def open_video(file: BinaryIO, name: str, limits: VideoLimits = DEFAULT_LIMITS) -> Iterator[VideoStream]:
    """Open a video at its beginning. Errors inside the `with` block also become DataError.

    Args:
        file: seekable file opened for reading; it stays open.
        name: name of the file, for error messages.

    Raises:
        DataError: the container is not supported, the file is damaged, or it exceeds a limit.
    """
    import av
    import av.error

    # max_pixels here also bounds the frames that FFmpeg decodes while it detects the kind of a stream.
    format_options = {"protocol_whitelist": "none", "max_pixels": str(limits.pixels)}
    try:
        kind = _container_format(file, name, limits)
        with av.open(file, mode="r", format=kind, options=format_options, metadata_errors="replace") as container:
            streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
            if not streams:
                raise DataError(f"{name} has no video stream; remove it")
            stream = streams[0]
            if stream.codec_context is None:
                raise DataError(f"the video {name} has a codec that this FFmpeg cannot decode; convert it")
            if stream.width * stream.height > limits.pixels:
                raise DataError(
                    f"{name} has frames of {stream.width} x {stream.height} pixels; at most {limits.pixels} are "
                    "decoded; shrink or remove it"
                )
            decoder = _decoder(stream)
            decoder.options = {"max_pixels": str(limits.pixels), "err_detect": "explode"}
            decoder.thread_count = 1  # callers decode several clips at a time instead
            yield VideoStream(container, stream, decoder, name, limits)
    except DataError:
        raise
    except (av.error.FFmpegError, ValueError, ArithmeticError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot decode the video {name}: {reason}; repair or remove it") from None
    except OSError as error:
        raise DataError(f"cannot read {name}: {error}") from None


def _decoder(stream: Any) -> Any:
    """Decoder of a stream: FFmpeg's own, or for transparent VP8 and VP9 that of libvpx, which decodes the opacity."""
    import av

    decoder = stream.codec_context
    if stream.metadata.get("alpha_mode") == "1" and decoder.name in _LIBVPX:
        return av.CodecContext.create(_LIBVPX[decoder.name], "r")
    return decoder


def _container_format(file: BinaryIO, name: str, limits: VideoLimits) -> str:
    """FFmpeg's name of the container, from its first bytes. FFmpeg's own detection would try every format."""
    if (size := file.seek(0, 2)) > limits.file_bytes:
        raise DataError(f"{name} has {size} bytes: too large for a video (at most {limits.file_bytes}); split it")
    file.seek(0)
    head = file.read(12)
    file.seek(0)
    if head[4:8] in _MOV_ATOMS:
        return "mp4"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    known = ", ".join(EXTENSIONS["video"])
    raise DataError(f"{name} is not a video file of a supported format ({known}): convert or remove it")


def _duration(item: Any, rate: Fraction) -> float:
    """Seconds that a packet or frame is shown."""
    return max(float((item.duration or 0) * item.time_base), 1 / float(rate))
