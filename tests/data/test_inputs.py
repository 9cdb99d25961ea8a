"""Images and videos found in folders, tars and lists; and inputs that must be refused by name."""

import io
import tarfile

import fsspec
import pytest
from PIL import Image

from rdm_scale.data.images import load_images
from rdm_scale.data.inputs import find_media
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
    found = find_media(str(folder))
    assert [(image.key, image.label) for image in found.files] == [
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
    found = find_media(str(folder / "dog"))
    assert [(image.key, image.label) for image in found.files] == [("b", -1)]
    assert found.class_names == ()


def test_images_beside_class_folders_are_refused(folder):
    (folder / "stray.png").write_bytes(encoded(flat("red")))
    with pytest.raises(DataError, match="1 of 5 images have no class"):
        find_media(str(folder))


def test_two_images_with_one_key_are_refused(folder):
    (folder / "dog/b.jpg").write_bytes(encoded(flat("red"), "JPEG"))
    with pytest.raises(DataError, match=r"dog/b\.jpg and .*dog/b\.png have the same key"):
        find_media(str(folder))


RED, BLUE = encoded(flat("red")), encoded(flat("blue"))


def test_tars_one_many_and_by_glob(tmp_path):
    write_tar(tmp_path / "a-0.tar", {"./x/1.png": RED, "./x/1.cls": b"2\n", "./x/1.json": b"{}", "x/1.npy": b""})
    write_tar(tmp_path / "a-1.tar", {"2.cls": b"0", "2.PNG": BLUE})
    for url in (tmp_path, tmp_path / "a-*.tar", tmp_path / "a-[01].tar"):
        found = find_media(str(url))
        assert [(image.key, image.label) for image in found.files] == [("x/1", 2), ("2", 0)]
        assert found.class_names == ("0", "1", "2") and found.ignored == 1
        assert [image.read() for image in found.files] == [RED, BLUE]
    assert [image.key for image in find_media(str(tmp_path / "a-1.tar")).files] == ["2"]


def test_classes_given_as_text_are_numbered_in_order(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.png": RED, "1.cls": b"wolf", "2.png": RED, "2.cls": b"747"})
    found = find_media(str(tmp_path / "a.tar"))
    assert found.class_names == ("747", "wolf") and [image.label for image in found.files] == [1, 0]


def test_names_that_people_give(tmp_path):
    names = ["Bildschirmfoto 2024\u202f11:00", "größe", "写真", "a&b%20c#d"]
    write_tar(tmp_path / "a.tar", {f"{name}.png": RED for name in names})
    (tmp_path / "in").mkdir()
    for name in names:
        (tmp_path / f"in/{name}.png").write_bytes(RED)
    for url in (tmp_path / "a.tar", tmp_path / "in"):
        images = find_media(str(url)).files
        assert sorted(image.key for image in images) == sorted(names)
        assert all(image.read() == RED for image in images)


def test_names_that_are_not_text(tmp_path):
    (tmp_path / "\udcff.png").write_bytes(RED)
    with pytest.raises(DataError, match="not UTF-8"):
        find_media(str(tmp_path))


def test_a_tar_without_classes(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.png": RED, "2.png": RED})
    found = find_media(str(tmp_path / "a.tar"))
    assert found.class_names == () and [image.label for image in found.files] == [-1, -1]


def test_other_file_systems():
    memory = fsspec.filesystem("memory")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("1.png")
        info.size = len(RED)
        tar.addfile(info, io.BytesIO(RED))
    memory.pipe({"/images_test/flat/1.png": RED, "/images_test/tars/a.tar": buffer.getvalue()})
    for url in ("memory://images_test/flat", "memory://images_test/tars", "memory://images_test/tars/*.tar"):
        (image,) = find_media(url).files
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
        find_media(str(tmp_path / "a.tar"))


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
            find_media(str(tmp_path / f"{name}.tar"))


def test_inputs_that_are_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.zip").write_bytes(b"")
    for name, message in (("empty", "no images"), ("nothing", "does not exist"), ("a.zip", "neither a folder")):
        with pytest.raises(DataError, match=message):
            find_media(str(tmp_path / name))


def test_images_beside_tars_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.png": RED})
    (tmp_path / "b.png").write_bytes(RED)
    with pytest.raises(DataError, match="both tars and images"):
        find_media(str(tmp_path))


def test_a_file_that_shrinks_after_it_was_found(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.png": RED})
    (image,) = find_media(str(tmp_path / "a.tar")).files
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:520])
    with pytest.raises(DataError, match=r"a\.tar:1\.png ends after"):
        image.read()
