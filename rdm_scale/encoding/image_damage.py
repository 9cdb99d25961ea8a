"""Detection of damage that image decoders hide.

Decoders show what is left of a damaged JPEG or WebP, and Pillow does not compare the checksums of a PNG. Neither JPEG
nor WebP has any. But damaged data take more or fewer bytes to decode than there are, which strict decoding finds.
"""

import io
import struct
from collections.abc import Iterator

from PIL import Image

from rdm_scale.encoding.jpeg_scans import JpegScans

# An encoder ends the coded data of a picture when nothing is left to code, to within 4 bytes (libwebp).
_NEEDED_BYTES = 32
_MIN_WEBP_BYTES = 128  # of the coded data of a picture that is looked at


def jpeg_damage(content: bytes) -> str | None:
    """Description of the damage of a JPEG; None if none is found."""
    scans = JpegScans.read(content)
    if not scans.complete:
        return "it ends before its end mark"
    if scans.impossible_zero_run:
        return "its coded data contain a run of zero bytes"
    if not scans.huffman:
        return None
    if (reason := _strict_jpeg_error(scans.bare)) is not None:
        return reason
    if scans.has_zero_run and _strict_jpeg_error(scans.bare[: -_NEEDED_BYTES - 2] + scans.bare[-2:]) is None:
        return "the zero bytes at the end of its coded data belong to no part of the picture"
    return None


def webp_damage(content: bytes) -> str | None:
    """Description of the damage of a WebP that can be decoded; None if none is found."""
    if (shortened := _shortened_webp(content)) is None:
        return None
    try:
        with Image.open(io.BytesIO(shortened), formats=("WEBP",)) as image:
            image.load()
    except Exception:  # of several types: the picture needs its last bytes
        return None
    return "the last bytes of its coded data belong to no part of the picture"


def _strict_jpeg_error(content: bytes) -> str | None:
    """Why FFmpeg's decoder refuses a JPEG when it has to report every fault; None if it decodes it."""
    import av
    import av.error

    decoder = av.CodecContext.create("mjpeg", "r")
    decoder.options, decoder.thread_count = {"err_detect": "explode"}, 1
    try:
        frames = [*decoder.decode(av.Packet(content)), *decoder.decode(None)]
    except av.error.InvalidDataError:
        return "its coded data are damaged"
    except av.error.FFmpegError:  # a variant that it does not know
        return None
    return "its coded data are damaged" if not frames or frames[0].is_corrupt else None


def _shortened_webp(content: bytes) -> bytes | None:
    """A WebP without the last bytes of its coded data; None if it is animated or tiny."""
    for kind, start, length in _webp_chunks(content):
        if kind not in (b"VP8 ", b"VP8L") or length < _MIN_WEBP_BYTES:
            continue
        data = content[start + 8 : start + 8 + length - _NEEDED_BYTES]
        rest = content[start + 8 + length + length % 2 :]
        chunks = content[12:start] + kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) + rest
        return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks
    return None


def _webp_chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, position and length of the data of each chunk."""
    place = 12
    while place + 8 <= len(content):
        kind, length = struct.unpack_from("<4sI", content, place)
        yield kind, place, length
        place += 8 + length + length % 2
