"""Images and videos found in folders, tars and lists; and inputs that must be refused by name."""

import io
import json
import tarfile

import fsspec
import pytest

from rdm_scale.encoding.images import decode
from rdm_scale.encoding.inputs import Columns, find_images, find_media
from rdm_scale.errors import DataError
from tests.support.media_files import BLUE, MOVIE, RED, encoded, flat, write_tar


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


@pytest.mark.parametrize("inside", [True, False], ids=["in a tar", "a file"])
def test_open_is_a_file_of_exactly_these_bytes(tmp_path, inside):
    if inside:
        write_tar(tmp_path / "a.tar", {"0.mp4": b"before" * 999, "1.mp4": MOVIE, "2.mp4": b"behind" * 999})
    else:
        (tmp_path / "1.mp4").write_bytes(MOVIE)
    file = next(file for file in find_media(str(tmp_path)).files if file.key == "1")
    assert file.read() == MOVIE
    with file.open() as video:
        assert video.readable() and video.seekable() and not video.writable()
        assert video.read(10) == MOVIE[:10] and video.tell() == 10
        assert video.seek(-7, io.SEEK_END) == len(MOVIE) - 7
        assert video.read() == MOVIE[-7:] and video.read() == b""
        assert video.seek(300) == 300 and video.seek(-100, io.SEEK_CUR) == 200
        assert video.read(3000) == MOVIE[200:3200]
        assert video.seek(len(MOVIE) + 5) and video.read(4) == b""
        with pytest.raises((ValueError, OSError)):
            video.seek(-1)
        video.seek(0)
        assert video.read() == MOVIE
    assert video.closed
    (tmp_path / ("a.tar" if inside else "1.mp4")).write_bytes(b"")
    with pytest.raises(DataError, match=r"1\.mp4 ends after 0 of"), file.open() as video:
        video.read()
        raise AssertionError if inside else DataError("1.mp4 ends after 0 of 0 bytes")  # an empty file is whole


def test_a_window_does_not_read_what_lies_around_it(tmp_path):
    """A tar of videos may be larger than the memory: a read must not cost more than what is asked for."""
    with (tmp_path / "a.tar").open("wb") as raw, tarfile.open(fileobj=raw, mode="w") as tar:
        info = tarfile.TarInfo("big.mp4")
        info.size = 2**36  # a hole on the disk
        raw.write(info.tobuf())
        raw.seek(info.size, io.SEEK_CUR)
        tar.offset = raw.tell()
        info = tarfile.TarInfo("small.mp4")
        info.size = len(MOVIE)
        tar.addfile(info, io.BytesIO(MOVIE))
    big, small = find_media(str(tmp_path / "a.tar")).files
    with big.open() as video:
        video.seek(2**35)
        assert video.read(1000) == bytes(1000)
    with small.open() as video:
        assert video.read() == MOVIE
    with pytest.raises(DataError, match="too large for an image"):
        big.read()


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
    (tmp_path / "cat/a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 text: it must hold a caption"):
        find_media(str(tmp_path))
    (tmp_path / "cat/a.txt").write_bytes(b"x" * (2**16 + 1))
    with pytest.raises(DataError, match=r"a\.txt has 65537 bytes: too many for a caption"):
        find_media(str(tmp_path))


def test_captions_in_tars(tmp_path):
    record = json.dumps({"label": 3, "caption": "from json", "width": 8}).encode()
    write_tar(
        tmp_path / "a.tar",
        {
            "0.txt": b"before its image",
            "0.png": RED,
            "0.cls": b"1",
            "1.png": RED,
            "1.json": record,
            "2.json": record,
            "2.txt": b"beats json",
            "2.cls": b"0",
            "2.png": RED,
            "9.txt": b"of no image",
        },
    )
    found = find_media(str(tmp_path / "a.tar"))
    assert [(f.label, f.caption) for f in found.files] == [(1, "before its image"), (3, "from json"), (0, "beats json")]
    assert found.captioned and found.ignored == 1
    write_tar(tmp_path / "b.tar", {"1.png": RED, "1.json": b'{"text": "a cat", "class": "cat"}'})
    assert not find_media(str(tmp_path / "b.tar")).captioned
    found = find_media(str(tmp_path / "b.tar"), Columns(label="class", caption="text"))
    assert found.files[0].caption == "a cat" and found.class_names == ("cat",)
    with pytest.raises(DataError, match="no captions in a column or field 'txt'"):
        find_media(str(tmp_path / "b.tar"), Columns(caption="txt"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"{", "1.json is not JSON"),
        (b"[1]", "1.json is not a JSON object"),
        (b"[" * 10**5, "1.json is not JSON"),
        (b" " * 2**21, "1.json has 2097152 bytes"),
        (b'{"label": -1}', "-1 in 'label' is no label"),
        (b'{"label": true}', "True in 'label' is no label"),
        (b'{"label": [1]}', "is no label"),
        (b'{"label": ""}', "is no label"),
        (b'{"label": 1e400}', "is no label"),
        (b'{"caption": ["a", "b"]}', "is no caption"),
        (b'{"caption": "' + b"x" * 70_000 + b'"}', "70000 bytes; at most 65536"),
        (b'{"caption": "\\ud800"}', "no valid Unicode"),
    ],
)
def test_json_in_tars_that_is_refused(tmp_path, record, message):
    write_tar(tmp_path / "a.tar", {"1.png": RED, "1.json": record})
    with pytest.raises(DataError, match=message):
        find_media(str(tmp_path / "a.tar"))


def test_options_go_to_the_file_system(tmp_path):
    (tmp_path / "a.png").write_bytes(RED)
    found = find_media(f"file://{tmp_path}", options={"auto_mkdir": True})
    assert found.files[0].location.fs.auto_mkdir and found.files[0].read() == RED


def test_sparse_members_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("1.png")
        info.type = tarfile.GNUTYPE_SPARSE
        tar.addfile(info)
    with pytest.raises(DataError, match=r"1\.png is stored as a sparse file"):
        find_media(str(tmp_path / "a.tar"))
