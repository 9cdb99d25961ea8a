"""Images of every kind that users have, found and decoded; and inputs that must be refused by name."""

import io
import struct
import tarfile
import zlib

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from rdm_scale.data.images import decode, find_images, load_images
from rdm_scale.errors import DataError


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flat(color: object, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new(mode, size, color)


def write_tar(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def bytes_of(x: torch.Tensor) -> np.ndarray:
    """[3, H, W] in [-1, 1] back to 0..255."""
    return ((x + 1) * 127.5).numpy()


def test_rgb_of_the_right_size_is_exact():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    x = decode(encoded(Image.fromarray(pixels)), 16, "x")
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
    np.testing.assert_allclose(bytes_of(decode(content, 8, "x"))[:, 3, 3], rgb, atol=1.01)


def test_cmyk_jpeg():
    # r = 255 - c - k and so on, for k = 0
    x = bytes_of(decode(encoded(flat((200, 100, 0, 0), "CMYK"), "JPEG", quality=100), 8, "x"))
    np.testing.assert_allclose(x.mean(axis=(1, 2)), (55, 155, 255), atol=4)


def test_exif_orientation_is_applied():
    image = flat((0, 0, 0), size=(16, 16))
    image.paste((255, 255, 255), (0, 0, 16, 8))  # white above, black below
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned by 90 degrees clockwise
    x = bytes_of(decode(encoded(image, "JPEG", exif=exif, quality=100), 16, "x"))
    assert x[:, :, :7].max() < 20 and x[:, :, 9:].min() > 235  # what was above is on the right


def test_the_short_side_is_resized_and_the_centre_cropped():
    image = flat("red", size=(96, 32))
    image.paste((0, 255, 0), (32, 0, 64, 32))
    for size in (16, 32, 48):
        plain = image.resize((3 * size, size), Image.Resampling.BICUBIC).crop((size, 0, 2 * size, size))
        x = bytes_of(decode(encoded(image), size, "x"))
        np.testing.assert_allclose(x.transpose(1, 2, 0), np.asarray(plain), atol=1e-4)
        upright = bytes_of(decode(encoded(image.transpose(Image.Transpose.TRANSPOSE)), size, "x"))
        np.testing.assert_array_equal(upright, x.transpose(0, 2, 1))
        np.testing.assert_allclose(x[:, :, 2:-2], np.broadcast_to([[[0]], [[255]], [[0]]], (3, size, size - 4)))


def test_shrinking_is_antialiased():
    checkered = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    x = bytes_of(decode(encoded(Image.fromarray(checkered)), 16, "x"))
    np.testing.assert_allclose(x, 127.5, atol=5)  # picking single pixels would give 0 and 255


def test_a_long_thin_image_stays_small():
    assert decode(encoded(flat("red", size=(30_000, 1))), 8, "x").shape == (3, 8, 8)


def png_of_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


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
        decode(content, 8, "holiday/beach.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_number_of_pixels_is_bounded_before_they_are_decoded():
    with pytest.raises(DataError, match=r"x\.png has 9500 x 9500 pixels; at most"):
        decode(png_of_size(9500, 9500), 8, "x.png")


@pytest.fixture
def folder(tmp_path):
    for name in ("dog/b.png", "cat/deep/a.JPG", "cat/c.webp", "ant.d/x.jpeg"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {"png": "PNG", "webp": "WEBP"}.get(path.suffix[1:], "JPEG")
        path.write_bytes(encoded(flat("red"), kind))
    (tmp_path / "in/cat/notes.txt").write_text("no image")
    (tmp_path / "in/cat/._c.webp").write_text("left by macOS")
    return tmp_path / "in"


def test_a_folder_of_classes(folder):
    found = find_images(str(folder))
    assert [(image.key, image.label) for image in found.images] == [
        ("ant.d/x", 0),
        ("cat/c", 1),
        ("cat/deep/a", 1),
        ("dog/b", 2),
    ]
    assert found.class_names == ("ant.d", "cat", "dog")
    assert found.ignored == 1  # notes.txt
    images, labels = load_images(str(folder), 8)
    assert images.shape == (4, 3, 8, 8) and labels.tolist() == [0, 1, 1, 2]


def test_a_flat_folder_has_no_classes(folder):
    found = find_images(str(folder / "dog"))
    assert [(image.key, image.label) for image in found.images] == [("b", -1)]
    assert found.class_names == ()


def test_images_beside_class_folders_are_refused(folder):
    (folder / "stray.png").write_bytes(encoded(flat("red")))
    with pytest.raises(DataError, match="1 of 5 images have no class"):
        find_images(str(folder))


def test_two_images_with_one_key_are_refused(folder):
    (folder / "dog/b.jpg").write_bytes(encoded(flat("red"), "JPEG"))
    with pytest.raises(DataError, match=r"dog/b\.jpg and .*dog/b\.png have the same key"):
        find_images(str(folder))


RED, BLUE = encoded(flat("red")), encoded(flat("blue"))


def test_tars_one_many_and_by_glob(tmp_path):
    write_tar(tmp_path / "a-0.tar", {"./x/1.png": RED, "./x/1.cls": b"2\n", "./x/1.json": b"{}"})
    write_tar(tmp_path / "a-1.tar", {"2.cls": b"0", "2.PNG": BLUE})
    for url in (tmp_path, tmp_path / "a-*.tar", tmp_path / "a-[01].tar"):
        found = find_images(str(url))
        assert [(image.key, image.label) for image in found.images] == [("x/1", 2), ("2", 0)]
        assert found.class_names == ("0", "1", "2") and found.ignored == 1
        assert [image.read() for image in found.images] == [RED, BLUE]
    assert [image.key for image in find_images(str(tmp_path / "a-1.tar")).images] == ["2"]


def test_classes_given_as_text_are_numbered_in_order(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.png": RED, "1.cls": b"wolf", "2.png": RED, "2.cls": b"747"})
    found = find_images(str(tmp_path / "a.tar"))
    assert found.class_names == ("747", "wolf") and [image.label for image in found.images] == [1, 0]


def test_names_that_people_give(tmp_path):
    names = ["Bildschirmfoto 2024\u202f11:00", "größe", "写真", "a&b%20c#d"]
    write_tar(tmp_path / "a.tar", {f"{name}.png": RED for name in names})
    (tmp_path / "in").mkdir()
    for name in names:
        (tmp_path / f"in/{name}.png").write_bytes(RED)
    for url in (tmp_path / "a.tar", tmp_path / "in"):
        images = find_images(str(url)).images
        assert sorted(image.key for image in images) == sorted(names)
        assert all(image.read() == RED for image in images)


def test_names_that_are_not_text(tmp_path):
    (tmp_path / "\udcff.png").write_bytes(RED)
    with pytest.raises(DataError, match="not UTF-8"):
        find_images(str(tmp_path))


def test_a_tar_without_classes(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.png": RED, "2.png": RED})
    found = find_images(str(tmp_path / "a.tar"))
    assert found.class_names == () and [image.label for image in found.images] == [-1, -1]


def test_other_file_systems():
    memory = fsspec.filesystem("memory")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("1.png")
        info.size = len(RED)
        tar.addfile(info, io.BytesIO(RED))
    memory.pipe({"/images_test/flat/1.png": RED, "/images_test/tars/a.tar": buffer.getvalue()})
    for url in ("memory://images_test/flat", "memory://images_test/tars", "memory://images_test/tars/*.tar"):
        (image,) = find_images(url).images
        assert image.key == "1" and image.read() == RED


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.txt": b"x"}, "no images"),
        ({"1.png": RED, "1.jpg": RED}, "same key '1'"),
        ({"1.png": RED, "1.cls": b"0", "2.png": RED}, "1 of 2 images have no class"),
        ({"1.png": RED, "1.cls": b" "}, "1.cls is empty"),
        ({"1.png": RED, "1.cls": b"\xff\xfe"}, "1.cls is not UTF-8"),
        ({"1.png": RED, "1.cls": b"a" * 5000}, "1.cls has 5000 bytes"),
        ({"1.png": RED, "1.cls": b"9" * 500}, "class number"),
        ({"1\x1f.png": RED}, "control character"),
    ],
)
def test_tars_that_are_refused(tmp_path, members, message):
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=message):
        find_images(str(tmp_path / "a.tar"))


def test_a_damaged_tar_is_named(tmp_path):
    write_tar(tmp_path / "a.tar", {f"{i}.png": RED for i in range(4)})
    whole = (tmp_path / "a.tar").read_bytes()
    member = 512 + 512 * -(-len(RED) // 512)
    for name, content in {
        "boundary": whole[: 2 * member],  # which tarfile and webdataset read as a normal end
        "inside": whole[: 2 * member + 600],
        "garbage": b"\x07" * 5000,
        "empty": b"",
    }.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
        with pytest.raises(DataError, match=f"{name}.tar"):
            find_images(str(tmp_path / f"{name}.tar"))


def test_inputs_that_are_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.zip").write_bytes(b"")
    for name, message in (("empty", "no images"), ("nothing", "does not exist"), ("a.zip", "neither a folder")):
        with pytest.raises(DataError, match=message):
            find_images(str(tmp_path / name))


def test_images_beside_tars_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.png": RED})
    (tmp_path / "b.png").write_bytes(RED)
    with pytest.raises(DataError, match="both images and tars"):
        find_images(str(tmp_path))


def test_a_file_that_shrinks_after_it_was_found(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.png": RED})
    (image,) = find_images(str(tmp_path / "a.tar")).images
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:520])
    with pytest.raises(DataError, match=r"a\.tar:1\.png ends after"):
        image.read()
