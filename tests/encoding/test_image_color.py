"""Colors and transparency of images against values worked out by hand, and metadata of any size beside them."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from rdm_scale.encoding.color import UNREADABLE_PROFILE
from rdm_scale.encoding.images import decode, image_size
from rdm_scale.encoding.remarks import Remarks
from rdm_scale.errors import DataError
from tests.support.media_files import encoded, flat, png_chunk, png_of

# Primaries of Display P3, adapted to D50, as its profiles state them.
DISPLAY_P3 = {
    b"rXYZ": (0.51512, 0.24120, -0.00105),
    b"gXYZ": (0.29198, 0.69225, 0.04189),
    b"bXYZ": (0.1571, 0.06657, 0.78407),
}


def levels(content: bytes, remarks: Remarks | None = None) -> list[list[int]]:
    """The RGB levels of each pixel of the first row."""
    size = image_size(content, "x")
    pixels = decode(content, *size, "x", remarks)[:, 0]
    return ((pixels + 1) * 127.5).round().int().T.tolist()


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def profile_with(primaries: dict[bytes, tuple[float, float, float]]) -> bytes:
    """The profile of sRGB with other primaries, put where its table of tags says."""
    profile = bytearray(srgb_profile())
    (count,) = struct.unpack_from(">I", profile, 128)
    for tag in range(count):
        name, offset, _ = struct.unpack_from(">4sII", profile, 132 + 12 * tag)
        if name in primaries:
            struct.pack_into(">3i", profile, offset + 8, *(round(65536 * value) for value in primaries[name]))
    return bytes(profile)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_colors_are_converted_from_the_profile_to_srgb(kind: str) -> None:
    """The red of sRGB is (0.917, 0.200, 0.139) in Display P3, its green (0.458, 0.985, 0.298)."""
    exact = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}, "PNG": {}}[kind]
    for color, expected in (((234, 51, 35), (255, 0, 0)), ((117, 251, 76), (0, 255, 0)), ((90, 90, 90), (90, 90, 90))):
        content = encoded(flat(color), kind, icc_profile=profile_with(DISPLAY_P3), **exact)
        np.testing.assert_allclose(levels(content)[0], expected, atol=4)  # 8 bits, in the dark


def test_profiles_of_gray_and_transparent_images() -> None:
    swapped = profile_with({b"rXYZ": (0.38515, 0.71687, 0.09708), b"gXYZ": (0.43607, 0.22249, 0.01392)})
    assert levels(encoded(flat((250, 0, 0)), icc_profile=swapped))[0] == pytest.approx([0, 250, 0], abs=1)
    # half transparent over white: 0.2 * color + 0.8 * 255, after the conversion
    assert levels(encoded(flat((250, 0, 0, 51), "RGBA"), icc_profile=swapped))[0] == pytest.approx(
        [204, 254, 204], abs=1
    )
    palette = flat(0, "P")
    palette.putpalette([250, 0, 0])
    assert levels(encoded(palette, icc_profile=swapped))[0] == pytest.approx([0, 250, 0], abs=1)
    assert levels(encoded(flat(77, "L"), icc_profile=swapped))[0] == [77, 77, 77]


def test_the_profile_of_srgb_changes_nothing() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 64, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(pixels), icc_profile=srgb_profile())
    assert levels(content) == pixels[0].tolist()


@pytest.mark.parametrize(
    "profile", [b"no profile", srgb_profile()[:300], bytes(1_200_000)], ids=["text", "cut", "zeros"]
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_profiles_that_cannot_be_used_are_ignored_and_counted(kind: str, profile: bytes) -> None:
    remarks = Remarks()
    exact = {"WEBP": {"lossless": True}}.get(kind, {})
    found = levels(encoded(flat((90, 90, 90)), kind, icc_profile=profile, **exact), remarks)
    np.testing.assert_allclose(found[0], (90, 90, 90), atol=1)
    assert list(remarks) == [f"{UNREADABLE_PROFILE}: 1 sample, for example x"]


def test_a_profile_for_another_kind_of_image_is_ignored_and_counted() -> None:
    remarks = Remarks()
    decode(encoded(flat((9, 9, 9, 9), "CMYK"), "JPEG", icc_profile=srgb_profile()), 8, 8, "x", remarks)
    decode(encoded(flat((9, 9, 9, 9), "CMYK"), "JPEG", icc_profile=srgb_profile()), 8, 8, "y", remarks)
    assert list(remarks) == [f"{UNREADABLE_PROFILE}: 2 samples, for example x"]


@pytest.mark.parametrize(
    ("depth", "row", "transparent", "expected"),
    [
        (1, b"\x80", 0, [255, 255, 255, 255]),
        (2, b"\x1b", 1, [0, 255, 170, 255]),  # levels 0, 1, 2, 3 of 3
        (4, b"\x01\x2f", 1, [0, 255, 34, 255]),  # levels 0, 1, 2, 15 of 15
        (8, b"\x00\x01\x02\xff", 1, [0, 255, 2, 255]),
        # Of 65535. The first bytes of the third level are those of the transparent one.
        (16, struct.pack(">4H", 0, 20000, 20001, 65535), 20000, [0, 255, 78, 255]),
    ],
)
def test_the_transparent_level_of_gray_pngs_is_white(
    depth: int, row: bytes, transparent: int, expected: list[int]
) -> None:
    content = png_of(depth, 0, b"\0" + row, (4, 1), tRNS=struct.pack(">H", transparent))
    assert [level for level, _, _ in levels(content)] == expected
    assert [level for _, level, _ in levels(png_of(depth, 0, b"\0" + row, (4, 1)))] != expected


def test_the_transparent_color_of_rgb_pngs_is_white() -> None:
    content = png_of(8, 2, b"\0\1\2\3\1\2\4", (2, 1), tRNS=struct.pack(">3H", 1, 2, 3))
    assert levels(content) == [[255, 255, 255], [1, 2, 4]]
    row = struct.pack(">6H", 2560, 5120, 7680, 2560, 5120, 7936)
    content = png_of(16, 2, b"\0" + row, (2, 1), tRNS=struct.pack(">3H", 2560, 5120, 7680))
    assert levels(content) == [[255, 255, 255], [10, 20, 31]]


def test_code_points_of_a_png() -> None:
    """Gray of 50 cd/m2 in PQ is 44.03 %, (50 / 203) of white in sRGB is 53.4 %."""
    row = b"\0" + bytes([112] * 3)  # 112 / 255 = 43.9 %
    assert levels(png_of(8, 2, row, (1, 1), cICP=bytes([9, 16, 0, 1])))[0] == pytest.approx([136] * 3, abs=2)
    assert levels(png_of(8, 2, row, (1, 1), cICP=bytes([1, 13, 0, 1])))[0] == [112] * 3
    with pytest.raises(DataError, match="x has a logarithmic transfer function, which is not supported"):
        levels(png_of(8, 2, row, (1, 1), cICP=bytes([1, 9, 0, 1])))


def test_metadata_of_any_size_do_not_matter() -> None:
    """A generator's workflow, an old profile, a preview: beside the pixels, and larger than decoders read."""
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 2_000_000, zip=True)
    text.add_text("prompt", "y" * 2_000_000)
    text.add_itxt("XML:com.adobe.xmp", "z" * 2_000_000, zip=True)
    content = encoded(flat((10, 200, 30)), pnginfo=text)
    assert image_size(content, "x") == (8, 8)
    assert levels(content)[0] == [10, 200, 30]
    for place in (content.index(b"IDAT") - 4, content.index(b"IEND") - 4):
        odd = content[:place] + png_chunk(b"tEXt", b"a\0" + bytes(3_000_000)) + content[place:]
        assert levels(odd)[0] == [10, 200, 30]
    bomb = png_chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2**26)))
    remarks = Remarks()
    start = content.index(b"IDAT") - 4
    assert levels(content[:start] + bomb + content[start:], remarks)[0] == [10, 200, 30]
    assert len(list(remarks)) == 1
    damaged = content[:start] + png_chunk(b"tIME", b"1234567")[:-4] + b"\0\0\0\0" + content[start:]
    assert levels(damaged)[0] == [10, 200, 30]


def test_an_orientation_in_xmp_counts() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta tiff:Orientation="6"/>')
    buffer = io.BytesIO()
    flat("red", size=(40, 20)).save(buffer, "PNG", pnginfo=text)
    assert image_size(buffer.getvalue(), "x") == (40, 20)
