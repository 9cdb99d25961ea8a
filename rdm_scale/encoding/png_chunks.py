"""The chunks of a PNG that matter for its picture.

Everything else beside the pixels (text of an image generator, thumbnails, animation) is left out unread, whatever its
size: limits of a decoder on such data would reject good pictures.
Source: Portable Network Graphics (PNG) Specification, third edition, chapters 5 and 11.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PIXELS, _END = b"IDAT", b"IEND"
_READ_HERE = (b"iCCP", b"cICP")
_KEPT = (b"IHDR", b"PLTE", _PIXELS, _END, b"tRNS", b"eXIf", *_READ_HERE)
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_ORIENTATION_KEYWORDS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # of texts that may hold an orientation
_GRAY, _RGB, _PALETTE = 0, 2, 3  # color types
_MAX_TEXT_BYTES = 2**20
_MAX_PROFILE_BYTES = 2**22


class PngPicture(NamedTuple):
    """A PNG reduced to what its picture consists of.

    Attributes:
        content: a PNG file of these chunks, those with an orientation before the pixels.
        oriented: True if it may hold an orientation.
        profile: ICC profile; None if there is none, empty if it cannot be read.
        transparent: the one gray level or color that is transparent, in levels as Pillow decodes them; None without.
        code_points: color primaries and transfer function of `cICP` by their numbers in ITU-T H.273; None without.
        damage: what is wrong with the chunks that were read; None if nothing is.
    """

    content: bytes
    oriented: bool
    profile: bytes | None
    transparent: tuple[int, ...] | None
    code_points: tuple[int, int] | None
    damage: str | None


class _Chunk(NamedTuple):
    kind: bytes
    start: int  # of the chunk in the file, with its length and kind
    data: bytes
    end: int
    intact: bool  # complete, with the right checksum


def read_png(content: bytes) -> PngPicture:
    """Read the chunks of a PNG that matter, as far as the file goes."""
    found: dict[bytes, bytes] = {}  # data by kind
    before, after = [SIGNATURE], []
    broken = None
    for chunk in _chunks(content):
        broken = broken or (None if chunk.intact else chunk.kind)
        raw = content[chunk.start : chunk.end]
        if chunk.kind in (_PIXELS, _END):
            after.append(raw)
            found[chunk.kind] = b""
            continue
        if chunk.kind in _TEXTS and not _text_fits(chunk):
            continue
        found[chunk.kind] = chunk.data
        if chunk.kind not in _READ_HERE and (chunk.kind != b"tRNS" or _header(found).color_type == _PALETTE):
            before.append(raw)
    profile, points = found.get(b"iCCP"), found.get(b"cICP", b"")
    damage: str | None
    if broken is not None:
        damage = f"its chunk {broken.decode('latin-1')} is cut short, or has a wrong checksum"
    else:
        damage = None if _END in found else "it ends before its end chunk"
    return PngPicture(
        b"".join(before + after),
        not found.keys().isdisjoint((b"eXIf", *_TEXTS)),
        None if profile is None else _inflate(profile.partition(b"\0")[2][1:], _MAX_PROFILE_BYTES) or b"",
        _transparent(found),
        (points[0], points[1]) if len(points) == 4 else None,
        damage,
    )


class _Header(NamedTuple):
    depth: int  # bits of a sample
    color_type: int


def _header(found: dict[bytes, bytes]) -> _Header:
    data = found.get(b"IHDR", b"")
    return _Header(data[8], data[9]) if len(data) >= 10 else _Header(8, _RGB)


def _transparent(found: dict[bytes, bytes]) -> tuple[int, ...] | None:
    """The transparent gray level or color, in levels as Pillow decodes them: scaled to 8 bits but for 16-bit gray.

    Pillow itself compares the unscaled value. Of 16-bit colors it keeps the high bytes, so these alone are compared.
    """
    depth, color_type = _header(found)
    data = found.get(b"tRNS")
    if data is None or (color_type, len(data)) not in ((_GRAY, 2), (_RGB, 6)):
        return None
    values = struct.unpack(f">{len(data) // 2}H", data)
    if color_type == _RGB:
        return tuple(value >> 8 if depth == 16 else value for value in values)
    return (values[0] if depth >= 8 else values[0] * 255 // (2**depth - 1),)


def _chunks(content: bytes) -> Iterator[_Chunk]:
    """Yield the chunks that matter; the data of others are not even copied."""
    place = len(SIGNATURE)
    while place + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        end = place + 12 + length
        keyword = content[place + 8 : place + 8 + 32]
        if kind in _KEPT or (kind in _TEXTS and keyword.startswith(_ORIENTATION_KEYWORDS)):
            data = content[place + 8 : end - 4]
            intact = end <= len(content) and zlib.crc32(data, zlib.crc32(kind)) == int.from_bytes(
                content[end - 4 : end]
            )
            yield _Chunk(kind, place, data, end, intact)
        if kind == _END:
            return
        place = end


def _text_fits(chunk: _Chunk) -> bool:
    """True if a text can be read within the limits of the decoder."""
    rest = chunk.data.partition(b"\0")[2]
    if len(chunk.data) > _MAX_TEXT_BYTES:
        return False
    if chunk.kind == b"zTXt":
        return _inflate(rest[1:], _MAX_TEXT_BYTES) is not None
    if chunk.kind == b"iTXt" and rest[:1] == b"\1":
        return _inflate(rest[2:].split(b"\0", 2)[-1], _MAX_TEXT_BYTES) is not None
    return True


def _inflate(data: bytes, limit: int) -> bytes | None:
    """Decompress at most `limit` bytes; None if there are more, or they are damaged."""
    try:
        inflater = zlib.decompressobj()
        content = inflater.decompress(data, limit)
        return content if inflater.eof else None
    except zlib.error:
        return None
