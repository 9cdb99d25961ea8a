"""Images, tars and what stands for a video, as tests write them."""

import io
import struct
import zlib
from pathlib import Path

from PIL import Image

from rdm_scale.storage.ustar import pack_ustar


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(depth: int, color_type: int, rows: bytes, size: tuple[int, int], **chunks: bytes) -> bytes:
    """A PNG written by hand: `rows` are the pixels with a filter byte before each row, `chunks` come before them."""
    header = struct.pack(">IIBBBBB", *size, depth, color_type, 0, 0, 0)
    before = b"".join(png_chunk(kind.encode(), data) for kind, data in chunks.items())
    pixels = png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + before + pixels + png_chunk(b"IEND", b"")


def flat(color: object, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new(mode, size, color)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.write_bytes(pack_ustar(members.items()).content)


RED, BLUE = encoded(flat("red")), encoded(flat("blue"))
MOVIE = bytes(range(256)) * 40
