"""Folders of images or videos: classes by sub-folder, captions beside files, and inconsistent folders."""

import pytest

from rdm_scale.encoding.images import decode
from rdm_scale.encoding.inputs import find_media
from rdm_scale.errors import DataError
from tests.support.media_files import RED, encoded, flat


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
    assert found.ignored == 2  # notes.txt, ._c.webp
    assert all(decode(file.read(), 8, 8, file.name).shape == (3, 8, 8) for file in found.files)


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


def test_names_that_are_not_text(tmp_path):
    (tmp_path / "\udcff.png").write_bytes(RED)
    with pytest.raises(DataError, match="not UTF-8"):
        find_media(str(tmp_path))


def test_captions_beside_files(tmp_path):
    texts = {"cat/a": "A  cat,\nasleep \n", "cat/b": "", "dog/c": "größe 写真"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(RED)
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "dog/notes.txt").write_text("of no file")
    found = find_media(str(tmp_path))
    assert found.captioned and [file.caption for file in found.files] == ["A  cat,\nasleep", "", "größe 写真"]
    assert found.class_names == ("cat", "dog") and found.ignored == 1
    (tmp_path / "cat/a.txt").unlink()
    with pytest.raises(DataError, match="1 of 3 images have no caption: give all of them one, or none"):
        find_media(str(tmp_path))
    (tmp_path / "cat/a.txt").write_bytes(b"\x81\x8d")
    with pytest.raises(DataError, match=r"a\.txt cannot be decoded as UTF-8.*: it must hold a caption; convert it to"):
        find_media(str(tmp_path))
    (tmp_path / "cat/a.txt").write_bytes(b"x" * (2**16 + 1))
    with pytest.raises(DataError, match=r"a\.txt has 65537 bytes: too many for a caption"):
        find_media(str(tmp_path))
