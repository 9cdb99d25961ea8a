"""Images of every kind that users have, found and decoded; and inputs that must be refused by name."""

import numpy as np
import pytest
import torch
from PIL import Image

from rdm_scale.encoding.images import center_box, decode, image_size
from rdm_scale.errors import DataError
from tests.support.media_files import encoded, flat, png_of


def bytes_of(x: torch.Tensor) -> np.ndarray:
    """[3, H, W] in [-1, 1] back to 0..255."""
    return ((x + 1) * 127.5).numpy()


def test_rgb_of_the_right_size_is_exact():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    x = decode(encoded(Image.fromarray(pixels)), 16, 16, "x")
    assert x.dtype == torch.float32 and x.shape == (3, 16, 16)
    assert x.min() >= -1 and x.max() <= 1
    torch.testing.assert_close(x, torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).float())


def palette_image(transparency: int | None) -> bytes:
    image = flat(1, "P")
    image.putpalette([255, 0, 0, 10, 20, 30])
    return encoded(image, **({} if transparency is None else {"transparency": bytes([255, transparency])}))


@pytest.mark.parametrize(
    ("content", "rgb"),
    [
        (encoded(flat(77, "L")), (77, 77, 77)),
        (encoded(flat(1, "1")), (255, 255, 255)),
        (palette_image(None), (10, 20, 30)),
        (palette_image(0), (255, 255, 255)),
        # over white: alpha * color + (1 - alpha) * 255
        (encoded(flat((0, 100, 200, 51), "RGBA")), (204, 224, 244)),
        (encoded(flat((100, 51), "LA")), (224, 224, 224)),
        (encoded(Image.fromarray(np.full((8, 8), 20_000, np.uint16))), (78, 78, 78)),
        (encoded(flat((10, 20, 30)), "WEBP", lossless=True), (10, 20, 30)),
    ],
    ids=["gray", "bilevel", "palette", "palette-transparent", "rgba", "gray-alpha", "16-bit", "webp"],
)
def test_every_mode_becomes_rgb(content, rgb):
    np.testing.assert_allclose(bytes_of(decode(content, 8, 8, "x"))[:, 3, 3], rgb, atol=1.01)


def test_cmyk_jpeg():
    # r = 255 - c - k and so on, for k = 0
    x = bytes_of(decode(encoded(flat((200, 100, 0, 0), "CMYK"), "JPEG", quality=100), 8, 8, "x"))
    np.testing.assert_allclose(x.mean(axis=(1, 2)), (55, 155, 255), atol=4)


def test_exif_orientation_is_applied():
    image = flat((0, 0, 0), size=(16, 16))
    image.paste((255, 255, 255), (0, 0, 16, 8))  # white above, black below
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned by 90 degrees clockwise
    x = bytes_of(decode(encoded(image, "JPEG", exif=exif, quality=100), 16, 16, "x"))
    assert x[:, :, :7].max() < 20 and x[:, :, 9:].min() > 235  # what was above is on the right


def test_the_short_side_is_resized_and_the_centre_cropped():
    image = flat("red", size=(96, 32))
    image.paste((0, 255, 0), (32, 0, 64, 32))
    for size in (16, 32, 48):
        plain = image.resize((3 * size, size), Image.Resampling.BICUBIC).crop((size, 0, 2 * size, size))
        x = bytes_of(decode(encoded(image), size, size, "x"))
        np.testing.assert_allclose(x.transpose(1, 2, 0), np.asarray(plain), atol=1e-4)
        upright = bytes_of(decode(encoded(image.transpose(Image.Transpose.TRANSPOSE)), size, size, "x"))
        np.testing.assert_array_equal(upright, x.transpose(0, 2, 1))
        np.testing.assert_allclose(x[:, :, 2:-2], np.broadcast_to([[[0]], [[255]], [[0]]], (3, size, size - 4)))


def test_shrinking_is_antialiased():
    checkered = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    x = bytes_of(decode(encoded(Image.fromarray(checkered)), 16, 16, "x"))
    np.testing.assert_allclose(x, 127.5, atol=5)  # picking single pixels would give 0 and 255


def test_a_long_thin_image_stays_small():
    assert decode(encoded(flat("red", size=(30_000, 1))), 8, 8, "x").shape == (3, 8, 8)


def png_of_size(width: int, height: int) -> bytes:
    return png_of(8, 2, b"", size=(width, height))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an image",
        encoded(flat("red", size=(64, 64)))[:-40],
        encoded(flat("red"), "GIF"),  # a decoder that is not wanted
        png_of_size(60_000, 60_000),
    ],
    ids=["empty", "text", "cut", "gif", "bomb"],
)
def test_what_cannot_be_decoded_is_named(content):
    with pytest.raises(DataError, match=r"holiday/beach\.png"):
        decode(content, 8, 8, "holiday/beach.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_number_of_pixels_is_bounded_before_they_are_decoded():
    with pytest.raises(DataError, match=r"x\.png has 9500 x 9500 pixels; at most"):
        decode(png_of_size(9500, 9500), 8, 8, "x.png")


@pytest.mark.parametrize("size", [(8, 8), (33, 20), (20, 33), (64, 63), (7, 301)])
def test_squares_are_those_of_pil_to_the_last_bit(size):
    """The packaged VAE and the figures of the quickstart were made with exactly this crop."""
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    short = min(size)
    left, top = (size[0] - short) // 2, (size[1] - short) // 2
    for target in (8, 16, 32):
        square = image.resize((target, target), Image.Resampling.BICUBIC, box=(left, top, left + short, top + short))
        expected = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1
        assert torch.equal(decode(encoded(image), target, target, "x"), expected)


@pytest.mark.parametrize(("height", "width"), [(16, 32), (32, 16), (24, 40), (16, 17)])
def test_a_box_of_any_aspect_is_covered_and_centred(height, width):
    for image_height, image_width in ((48, 96), (96, 48), (50, 50), (31, 200)):
        rows, columns = np.indices((image_height, image_width))
        pixels = np.stack([columns * 255 / image_width, rows * 255 / image_height, 0 * rows], axis=-1).round()
        x = bytes_of(decode(encoded(Image.fromarray(pixels.astype(np.uint8))), height, width, "x"))
        assert x.shape == (3, height, width)
        box_width = min(image_width, image_height * width / height)  # one side is kept whole
        box_height = min(image_height, image_width * height / width)
        across, down = x[0].mean(axis=0) * image_width / 255, x[1].mean(axis=1) * image_height / 255  # pixels of origin
        inner = slice(2, -2)  # the filter is cut off at the borders
        left, top = (image_width - box_width) // 2, (image_height - box_height) // 2
        for found, start, side, count in ((across, left, box_width, width), (down, top, box_height, height)):
            expected = start + (np.arange(count) + 0.5) * side / count - 0.5
            np.testing.assert_allclose(found[inner], expected[inner], atol=1)  # 8 bits for up to 200 pixels
            assert found[inner].mean() == pytest.approx(expected[inner].mean(), abs=0.3)


def test_boxes_lie_within_the_image():
    for height, width in ((1, 30_000), (30_000, 1), (479, 853), (1, 1)):
        for to_height, to_width in ((8, 8), (7, 300), (301, 8), (256, 144)):
            left, top, right, bottom = center_box(height, width, to_height, to_width)
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            assert (right - left) / (bottom - top) == pytest.approx(to_width / to_height)
            decode(encoded(flat("red", size=(width, height))), to_height, to_width, "x")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_sizes_are_those_of_the_upright_image(kind):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = encoded(flat("red", size=(40, 20)), kind, exif=exif)
        assert image_size(content, "x") == ((40, 20) if orientation > 4 else (20, 40))
    assert image_size(encoded(flat("red", size=(40, 20)), kind), "x") == (20, 40)


def test_an_orientation_at_the_end_of_a_png_counts():
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded(flat("red", size=(40, 20)), exif=exif)
    start = whole.index(b"eXIf") - 4
    length = 12 + int.from_bytes(whole[start : start + 4], "big")
    chunk, rest = whole[start : start + length], whole[:start] + whole[start + length :]
    assert image_size(rest, "x") == (20, 40)
    end = rest.index(b"IEND") - 4
    moved = rest[:end] + chunk + rest[end:]
    assert image_size(moved, "x") == (40, 20)
    assert decode(moved, 8, 8, "x").shape == (3, 8, 8)


def test_sizes_are_read_from_the_header_alone():
    content = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)))
    assert image_size(content[:200], "x") == (64, 48)
    assert image_size(png_of_size(9000, 9000), "x") == (9000, 9000)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_sizes_of_what_is_no_image():
    for content in (b"", b"text", encoded(flat("red"), "GIF"), png_of_size(9500, 9500)):
        with pytest.raises(DataError, match=r"holiday/beach\.png"):
            image_size(content, "holiday/beach.png")
