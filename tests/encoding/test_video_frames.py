"""Frames as players show them: display matrices, color spaces and transparency, against values worked out by hand."""

import io
import itertools
import math
import struct
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest

from rdm_scale.encoding.remarks import Remarks
from rdm_scale.encoding.video_frames import ODD_MATRIX
from rdm_scale.errors import DataError
from tests.support.clip_files import clip_of, metadata_of, video

ONE = 1 << 16  # of a display matrix
BT709, SMPTE170M, BT2020 = 1, 6, 9  # matrix coefficients
LUMINANCE = {BT709: (0.2126, 0.0722), SMPTE170M: (0.299, 0.114), BT2020: (0.2627, 0.0593)}  # of red and of blue
UNSPECIFIED, LOG, P3, PQ, HLG = 2, 9, 12, 16, 18


def corners() -> np.ndarray:
    """A frame of 32 x 64 pixels with the levels 60, 120, 180 and 240 in its quarters, row by row."""
    return np.repeat(np.kron([[60, 120], [180, 240]], np.ones((16, 32)))[..., None], 3, axis=-1).astype(np.uint8)


def with_matrix(content: bytes, a: float, b: float, c: float, d: float) -> bytes:
    """An MP4 with another display matrix: (x, y) is shown at (a x + c y, b x + d y), moved to begin at (0, 0)."""
    place = content.index(b"tkhd") + 44
    x, y = max(0.0, -a * 64) + max(0.0, -c * 32), max(0.0, -b * 64) + max(0.0, -d * 32)
    values = (a, b, 0, c, d, 0, x, y)
    return (
        content[:place] + struct.pack(">9i", *(round(ONE * value) for value in values), 1 << 30) + content[place + 36 :]
    )


def shown(content: bytes, remarks: Remarks | None = None) -> list[list[int]]:
    """Levels of the quarters of the frame that is shown, at its full size."""
    size = metadata_of(content)
    clip = clip_of(content, 0, height=size.height, width=size.width, remarks=remarks)
    rows, columns = (np.array([1, 3]) * length // 4 for length in clip.shape[2:])
    levels = ((clip[0, 0][rows][:, columns] + 1) * 127.5 / 60).round().int() * 60
    assert (size.height, size.width) in ((32, 64), (64, 32))
    return [[size.height], *levels.tolist()]


@pytest.fixture(scope="module")
def plain() -> bytes:
    return video([corners()] * 2, pixels="yuv444p", options={"qp": "0"})


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("x_sign", "y_sign"), itertools.product((1, -1), (1, -1)))
def test_all_display_matrices(plain: bytes, transposed: bool, x_sign: int, y_sign: int) -> None:
    matrix = (0, y_sign, x_sign, 0) if transposed else (x_sign, 0, 0, y_sign)
    a, b, c, d = matrix
    expected = [[0, 0], [0, 0]]
    for (row, y), (column, x) in itertools.product(enumerate((-1, 1)), enumerate((-1, 1))):  # from the center
        to_x, to_y = a * x + c * y, b * x + d * y
        expected[(to_y + 1) // 2][(to_x + 1) // 2] = [[60, 120], [180, 240]][row][column]
    assert shown(with_matrix(plain, *matrix)) == [[64 if transposed else 32], *expected]


def test_matrices_that_say_nothing(plain: bytes) -> None:
    stored = [[32], [60, 120], [180, 240]]
    remarks = Remarks()
    assert shown(with_matrix(plain, 0, 0, 0, 0), remarks) == stored and not remarks.found
    for degrees in (30, 45, 60, 200):
        cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        remarks = Remarks()
        assert shown(with_matrix(plain, cosine, sine, -sine, cosine), remarks) == stored
        assert remarks.found.keys() == {ODD_MATRIX}


def flat_video(
    rgb: tuple[float, float, float], matrix: int, tags: dict[str, int], size: tuple[int, int] = (64, 64)
) -> bytes:
    """A video of one color R'G'B' in [0, 1], converted by hand to 10-bit Y'CbCr of the matrix, without loss."""
    red, blue = LUMINANCE[matrix]
    luma = red * rgb[0] + (1 - red - blue) * rgb[1] + blue * rgb[2]
    values = (
        64 + 876 * luma,
        512 + 896 * (rgb[2] - luma) / (2 - 2 * blue),
        512 + 896 * (rgb[0] - luma) / (2 - 2 * red),
    )
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        stream: Any = output.add_stream("ffv1", rate=8, options={"threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv444p10le"
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for i in range(2):
            frame = av.VideoFrame(size[1], size[0], "yuv444p10le")
            for plane, value in zip(frame.planes, values, strict=True):
                plane.update(np.full(plane.buffer_size // 2, round(value), np.uint16).tobytes())
            for name, value in tags.items():
                setattr(frame, name, value)
            frame.pts, frame.time_base = i, Fraction(1, 8)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


def color_of(content: bytes) -> list[float]:
    clip = clip_of(content, 0, height=16, width=16)
    return ((clip.mean((1, 2, 3)) + 1) * 127.5).tolist()


@pytest.mark.parametrize(
    ("matrix", "stated", "size"),
    [
        (SMPTE170M, UNSPECIFIED, (576, 720)),
        (BT709, UNSPECIFIED, (32, 1280)),
        (BT709, UNSPECIFIED, (640, 64)),
        (SMPTE170M, SMPTE170M, (640, 64)),
        (BT709, BT709, (64, 64)),
    ],
)
def test_video_that_states_no_matrix_is_decoded_as_players_do(matrix: int, stated: int, size: tuple[int, int]) -> None:
    content = flat_video((200 / 255, 40 / 255, 90 / 255), matrix, {"colorspace": stated}, size)
    assert color_of(content) == pytest.approx([200, 40, 90], abs=2)


def srgb_of(light: float) -> float:
    """Level of sRGB of linear light."""
    return 255 * (12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055)


def pq_of(nits: float) -> float:
    """Signal of PQ (SMPTE ST 2084)."""
    power = (nits / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


@pytest.mark.parametrize("nits", [1, 10, 50, 90])
def test_pq_in_the_range_of_a_display_keeps_its_light(nits: float) -> None:
    """Below the knee of the tone curve (1.5 * 0.7726 - 0.5 of the signal of 1000 cd/m2, 94 cd/m2), light is kept."""
    tags = {"colorspace": BT2020, "color_primaries": BT2020, "color_trc": PQ}
    found = color_of(flat_video((pq_of(nits),) * 3, BT2020, tags))
    assert found == pytest.approx([srgb_of(nits / 203)] * 3, abs=2)


def test_pq_above_is_compressed_up_to_white() -> None:
    tags = {"colorspace": BT2020, "color_primaries": BT2020, "color_trc": PQ}
    levels = [color_of(flat_video((pq_of(nits),) * 3, BT2020, tags))[1] for nits in (150, 203, 500, 1000, 4000)]
    assert all(np.diff(levels[:4]) > 3) and levels[3:] == pytest.approx([255, 255], abs=1)
    # 203 cd/m2 by hand: the signal 0.5807 / 0.7518 = 0.7724 is t = 1 / 3 above the knee 0.6586, where the spline gives
    # 20 / 27 * 0.6586 + 4 / 27 * 0.3414 + 7 / 27 * 0.7724 = 0.7387, a signal of 0.5553, which is 157.5 cd/m2.
    assert pq_of(157.5) == pytest.approx(0.5553, abs=1e-3)
    assert levels[1] == pytest.approx(srgb_of(157.5 / 203), abs=2)


def test_hlg() -> None:
    """Diffuse white, a signal of 75 %, is 203 cd/m2 on a display of 1000 (BT.2408, table 1), as in PQ."""
    tags = {"colorspace": BT2020, "color_primaries": BT2020}
    hlg = color_of(flat_video((0.75,) * 3, BT2020, tags | {"color_trc": HLG}))
    pq = color_of(flat_video((pq_of(203),) * 3, BT2020, tags | {"color_trc": PQ}))
    assert hlg == pytest.approx(pq, abs=2)
    # 30 %: scene light 0.3**2 / 3 = 0.03, shown as 1000 * 0.03**1.2 = 14.9 cd/m2
    dark = color_of(flat_video((0.3,) * 3, BT2020, tags | {"color_trc": HLG}))
    assert dark == pytest.approx([srgb_of(14.9 / 203)] * 3, abs=2)


def test_primaries_of_a_wide_gamut() -> None:
    """The red of sRGB is (0.6274, 0.0691, 0.0164) in linear BT.2020 (ITU-R BT.2087) and (234, 51, 35) in Display P3."""
    wide = flat_video((0.8138, 0.2915, 0.1353), BT2020, {"colorspace": BT2020, "color_primaries": BT2020})
    assert color_of(wide) == pytest.approx([255, 0, 0], abs=5)
    p3 = flat_video((234 / 255, 51 / 255, 35 / 255), BT709, {"colorspace": BT709, "color_primaries": P3})
    assert color_of(p3) == pytest.approx([255, 0, 0], abs=5)


def test_color_spaces_that_are_not_supported() -> None:
    for tags, message in (
        ({"color_trc": LOG}, "a logarithmic transfer function, which is not supported: convert it to BT.709"),
        ({"colorspace": 8}, r"matrix coefficients 8 \(ITU-T H.273\), which are not supported"),
        ({"color_primaries": 10}, "XYZ colors, which is not supported"),
    ):
        with pytest.raises(DataError, match=f"the video a video has {message}"):
            clip_of(flat_video((0.5, 0.5, 0.5), BT709, tags))


@pytest.mark.parametrize(
    ("container", "codec", "pixels", "options"),
    [
        ("webm", "libvpx-vp9", "yuva420p", {"auto-alt-ref": "0", "g": "4"}),
        ("webm", "libvpx", "yuva420p", {"auto-alt-ref": "0", "g": "4"}),
        ("mov", "prores_ks", "yuva444p10le", {"profile": "4444"}),
        ("mov", "qtrle", "argb", {}),
        ("mov", "png", "rgba", {}),
        ("matroska", "ffv1", "yuva444p", {}),
    ],
)
def test_transparency_is_white_as_in_images(container: str, codec: str, pixels: str, options: dict[str, str]) -> None:
    frame = np.zeros((64, 64, 4), np.uint8)
    frame[:, :32] = (200, 40, 90, 255)
    frame[:, 32:] = (0, 200, 0, 0)  # a hidden color
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=8, options={"threads": "1", **options})
        stream.height, stream.width, stream.pix_fmt = 64, 64, pixels
        for i in range(12):
            encoded = av.VideoFrame.from_ndarray(frame, format="rgba").reformat(format=pixels)
            encoded.pts, encoded.time_base = i, Fraction(1, 8)
            output.mux(stream.encode(encoded))
        output.mux(stream.encode())
    for start in (0, 9):  # and after a seek
        clip = (clip_of(buffer.getvalue(), start, 2, height=64, width=64) + 1) * 127.5
        np.testing.assert_allclose(clip[:, :, 32, 8].mean(1), (200, 40, 90), atol=6)
        assert clip[:, :, :, 40:].min() > 250
