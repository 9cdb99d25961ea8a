"""Damaged images that decoders show in part, and odd but whole ones that must pass."""

import io
import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from rdm_scale.encoding.images import decode
from rdm_scale.errors import DataError
from tests.support.media_files import encoded, png_chunk

Damage = Callable[[bytes], bytes]


def photo(height: int = 128, width: int = 160, white_rows: int = 0) -> Image.Image:
    """A noisy color gradient; its last rows may be white."""
    y, x = np.indices((height, width))
    noise = np.random.default_rng(0).normal(0, 8, (height, width, 3))
    colors = np.stack([128 + 80 * np.sin(x / 30), 128 + 80 * np.cos(y / 23), (x + y) / 3], axis=-1) + noise
    pixels = colors.clip(0, 255).astype(np.uint8)
    pixels[height - white_rows :] = 255
    return Image.fromarray(pixels)


def hole(content: bytes, size: int = 800) -> bytes:
    """Zeros in the middle, as a download with a missing part leaves them."""
    middle = len(content) // 2
    return content[:middle] + bytes(size) + content[middle + size :]


def zeroed_tail(content: bytes) -> bytes:
    """Zeros to the end, as in a file that was made at its full size before its content came."""
    return content[: len(content) // 2] + bytes(len(content) - len(content) // 2)


def zeroed_tail_with_end(content: bytes) -> bytes:
    return zeroed_tail(content)[:-2] + b"\xff\xd9"


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def cut_and_ended(content: bytes) -> bytes:
    return cut(content) + b"\xff\xd9"


def without_end(content: bytes) -> bytes:
    assert content.endswith(b"\xff\xd9")
    return content[:-2]


JPEGS: dict[str, dict[str, object]] = {
    "plain": {"quality": 90},
    "444": {"quality": 92, "subsampling": 0},
    "optimized": {"quality": 80, "optimize": True},
    "progressive": {"quality": 90, "progressive": True},
    "restarts": {"quality": 85, "restart_marker_rows": 1},
}


@pytest.mark.parametrize("damage", [hole, zeroed_tail, zeroed_tail_with_end, cut, cut_and_ended, without_end])
@pytest.mark.parametrize("kind", JPEGS)
def test_damaged_jpegs_are_refused(kind: str, damage: Damage) -> None:
    content = encoded(photo(), "JPEG", **JPEGS[kind])
    decode(content, 16, 16, "whole.jpg")
    with pytest.raises(DataError, match=r"a/b\.jpg.*repair or remove it"):
        decode(damage(content), 16, 16, "a/b.jpg")


def test_zeros_that_are_more_than_a_flat_rest_are_refused() -> None:
    """With these codes zero bytes are flat blocks, but there are more than the picture has left."""
    content = encoded(photo(white_rows=40), "JPEG", quality=60, optimize=True)
    decode(content, 16, 16, "x")
    with pytest.raises(DataError, match="it ends before its end mark"):
        decode(zeroed_tail(content), 16, 16, "x")
    with pytest.raises(DataError, match="the zero bytes at the end of its coded data belong to no part of the picture"):
        decode(zeroed_tail_with_end(content), 16, 16, "x")


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_flat_parts_of_jpegs_are_no_damage(kind: str, mode: str) -> None:
    """The coded data of white rows may be thousands of zero bytes, where optimized Huffman codes make them so."""
    content = encoded(photo(512, 512, white_rows=480).convert(mode), "JPEG", **JPEGS[kind])
    if (kind, mode) == ("optimized", "RGB"):
        assert bytes(256) in content
    assert decode(content, 16, 16, "x.jpg")[:, -2:].min() > 0.95


def test_what_follows_the_end_mark_of_a_jpeg_does_not_matter() -> None:
    """Phones append videos, depth maps and second pictures."""
    content = encoded(photo(), "JPEG", quality=90)
    for rest in (bytes(5000), b"\xff\xd8 another picture", content[: len(content) // 2]):
        np.testing.assert_array_equal(decode(content + rest, 16, 16, "x"), decode(content, 16, 16, "x"))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_metadata_of_jpegs_do_not_matter() -> None:
    content = encoded(photo(), "JPEG", quality=90)
    for body in (b"Exif\0\0" + bytes(range(100)), b"Exif\0\0II*\0\xff\xff\xff\xff", b"ICC_PROFILE\0\7\2"):
        segment = struct.pack(">BBH", 0xFF, 0xE1 + (body[0] == ord("I")), len(body) + 2) + body
        odd = content[:2] + segment + content[2:]
        np.testing.assert_array_equal(decode(odd, 16, 16, "x"), decode(content, 16, 16, "x"))


@pytest.mark.parametrize("how", [{"lossless": True}, {"quality": 80}, {"quality": 95, "method": 6}], ids=str)
def test_damaged_webps_are_refused(how: dict[str, object]) -> None:
    content = encoded(photo(), "WEBP", **how)
    decode(content, 16, 16, "whole.webp")
    for damage in (zeroed_tail, cut):
        with pytest.raises(DataError, match=r"a/b\.webp.*repair or remove it"):
            decode(damage(content), 16, 16, "a/b.webp")


@pytest.mark.parametrize("how", [{"lossless": True, "method": 0, "quality": 0}, {"quality": 80}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_flat_parts_of_webps_are_no_damage(how: dict[str, object], mode: str) -> None:
    content = encoded(photo(512, 512, white_rows=480).convert(mode), "WEBP", **how)
    assert content.endswith(bytes(16))
    assert decode(content, 16, 16, "x.webp")[:, -2:].min() > 0.95


def test_the_checksums_of_a_png_are_compared() -> None:
    """Pillow reads past those of the pixels, and may stop before the checksum of the compressed data."""
    whole = encoded(photo(), compress_level=0)
    start = whole.index(b"IDAT")
    length = int.from_bytes(whole[start - 4 : start])
    data, rest = whole[start + 4 : start + 4 + length], whole[start + 8 + length :]
    parts = [png_chunk(b"IDAT", data[:-4]), png_chunk(b"IDAT", data[-4:])]
    content = bytearray(whole[: start - 4] + b"".join(parts) + rest)
    decode(bytes(content), 16, 16, "whole.png")
    content[start + 3000] ^= 0xFF
    Image.open(io.BytesIO(bytes(content))).load()
    with pytest.raises(DataError, match=r"b\.png is damaged: its chunk IDAT is cut short, or has a wrong checksum"):
        decode(bytes(content), 16, 16, "b.png")
    with pytest.raises(DataError, match=r"b\.png is damaged: it ends before its end chunk"):
        decode(whole[: whole.index(b"IEND") - 4], 16, 16, "b.png")
