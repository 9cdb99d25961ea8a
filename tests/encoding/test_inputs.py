"""Images and videos found in folders, tars and lists; and inputs that must be refused by name."""

import io
import tarfile

import fsspec
import pytest

from rdm_scale.encoding.inputs import find_images, find_media
from rdm_scale.errors import DataError
from tests.support.media_files import MOVIE, RED, write_tar


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


def test_videos_in_folders_and_tars(tmp_path):
    (tmp_path / "in/cat").mkdir(parents=True)
    for name in ("a.mp4", "b.AVI", "c.webm", "d.mkv", "e.mov"):
        (tmp_path / "in/cat" / name).write_bytes(MOVIE)
    write_tar(tmp_path / "a.tar", {"cat/a.mp4": MOVIE, "cat/a.cls": b"cat", "cat/b.mkv": MOVIE, "cat/b.cls": b"cat"})
    for url, count in ((tmp_path / "in", 5), (tmp_path / "a.tar", 2)):
        found = find_media(str(url))
        assert found.kind == "video" and found.class_names == ("cat",)
        assert [file.key for file in found.files] == [f"cat/{key}" for key in "abcde"[:count]]
        with pytest.raises(DataError, match=f"holds {count} videos: images are needed"):
            find_images(str(url))


def test_a_mixture_is_refused_with_both_counts(tmp_path):
    for name in ("a.mp4", "b.png", "c.jpg"):
        (tmp_path / name).write_bytes(RED)
    with pytest.raises(DataError, match="both 2 images and 1 videos"):
        find_media(str(tmp_path))


def test_options_go_to_the_file_system(tmp_path):
    (tmp_path / "a.png").write_bytes(RED)
    found = find_media(f"file://{tmp_path}", options={"auto_mkdir": True})
    assert found.files[0].location.fs.auto_mkdir and found.files[0].read() == RED
