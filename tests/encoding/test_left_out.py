"""What an input holds beside its images or videos: everything is counted by kind, and too much of it refused."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from rdm_scale.encoding.inputs import MediaSet, find_media
from rdm_scale.errors import DataError
from tests.support.media_files import BLUE, RED, write_tar


def tally(found: MediaSet) -> dict[str, tuple[int, str, bool]]:
    return {one.kind: (one.number, one.example.rsplit("/", 1)[-1], one.missed) for one in found.left_out}


def put(folder: Path, *paths: str) -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(RED)
    return folder


def test_files_of_a_folder_by_kind(tmp_path: Path) -> None:
    names = ["a.png", "b.jfif", "c.gif", "d.GIF", "e.avif", "f", "LICENSE", "labels.csv", "x.qqq", ".DS_Store", "t.txt"]
    put(tmp_path, *names, ".git/config.png", "b.jpg.123456789012")
    os.mkfifo(tmp_path / "pipe")
    found = find_media(str(tmp_path))
    assert [file.key for file in found.files] == ["a", "b"]
    assert tally(found) == {
        ".gif files, a format that is not read": (2, "c.gif", True),
        ".avif files, a format that is not read": (1, "e.avif", True),
        ".qqq files, a suffix that is not known": (1, "x.qqq", True),
        "files with odd suffixes": (1, "b.jpg.123456789012", True),
        "special files (pipes, sockets, devices)": (1, "pipe", True),
        "files without a suffix": (1, "LICENSE", False),
        ".csv files": (1, "labels.csv", False),
        ".txt files that are no captions": (1, "t.txt", False),
        "hidden files": (1, ".DS_Store", False),
        "hidden folders": (1, ".git", False),
        "files without a suffix that may be images or videos": (1, "f", True),
    }
    assert found.ignored == 12


def test_more_than_the_allowed_share_is_refused_by_name(tmp_path: Path) -> None:
    put(tmp_path, *(f"{i}.png" for i in range(9)), "a.gif", "LICENSE", "notes.txt")
    found = find_media(str(tmp_path))
    found.check_left_out(0.1)
    message = r"1 of 10 entries of the input would be left out, more than a share of 0\.09: 1 \.gif files.*a\.gif"
    with pytest.raises(DataError, match=message):
        found.check_left_out(0.09)
    (tmp_path / "a.gif").unlink()
    find_media(str(tmp_path)).check_left_out(0.0)  # annotations and the like are never missed


def test_links_are_followed_and_cycles_noticed(tmp_path: Path) -> None:
    put(tmp_path, "in/cat/1.png", "pool/dog/2.png", "pool/3.png")
    (tmp_path / "in/dog").symlink_to(tmp_path / "pool/dog")
    (tmp_path / "in/emu").mkdir()
    (tmp_path / "in/emu/3.png").symlink_to("../../pool/3.png")
    (tmp_path / "in/emu/gone.png").symlink_to("nowhere.png")
    (tmp_path / "in/cat/again").symlink_to(tmp_path / "in")
    (tmp_path / "pool/dog/self").symlink_to(".")
    found = find_media(str(tmp_path / "in"))
    assert [file.key for file in found.files] == ["cat/1", "dog/2", "emu/3"]
    assert found.class_names == ("cat", "dog", "emu") and all(file.read() == RED for file in found.files)
    assert tally(found) == {
        "links that lead to nothing": (1, "gone.png", True),
        "links to a folder that they lie in": (2, "again", False),
    }


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "cat/1.png", "dog/2.png")
    scan = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("/dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read every folder
    with pytest.raises(DataError, match=r"cannot read the input .*: .*Permission denied: '.*/dog'"):
        find_media(str(tmp_path))


def test_what_lies_beside_tars(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"1.png": RED})
    put(tmp_path, "more/b.tar", "images/2.png", "a.idx", "b.tar.gz", "more/notes.txt")
    found = find_media(str(tmp_path))
    assert [file.key for file in found.files] == ["1"]
    assert tally(found) == {
        "images, videos or tars in sub-folders of a folder of tars": (2, "2.png", True),
        ".gz files, a format that is not read": (1, "b.tar.gz", True),
        ".idx files": (1, "a.idx", False),
        ".txt files": (1, "notes.txt", False),
    }


def test_tars_inside_a_folder_of_images_are_counted(tmp_path: Path) -> None:
    put(tmp_path, "cat/1.png", "cat/more.tar")
    assert tally(find_media(str(tmp_path))) == {".tar files, a format that is not read": (1, "more.tar", True)}


def test_members_of_a_tar_by_kind(tmp_path: Path) -> None:
    members = {
        "1.png": RED,
        "1.seg.png": BLUE,
        **dict.fromkeys(["1.npy", "1.clip.npy", "1.odd", "8.gif", "7.odd", "7.npy", "._1.png", "README"], b""),
        "9.cls": b"0",
    }
    write_tar(tmp_path / "a.tar", members)
    found = find_media(str(tmp_path / "a.tar"))
    assert [file.key for file in found.files] == ["1"] and found.files[0].read() == RED
    assert {kind: (number, missed) for kind, (number, _, missed) in tally(found).items()} == {
        ".gif files, a format that is not read": (1, True),
        ".odd files, a suffix that is not known": (1, True),
        ".odd files of samples": (1, False),
        ".npy files of samples": (2, False),
        ".npy files": (1, False),
        ".cls files of no image or video": (1, False),
        "fields of samples, such as KEY.seg.png": (1, False),
        "files without a suffix": (1, False),
        "hidden files": (1, False),
    }
    assert found.ignored == 10


def test_dots_in_the_names_of_members(tmp_path: Path) -> None:
    files = {"photo_v1.png": RED, "photo_v1.1.png": BLUE, "x.y/b.2024.JPG": RED}
    labels = {"photo_v1.cls": b"1", "photo_v1.1.cls": b"2", "x.y/b.2024.json": b'{"label": 3}'}
    write_tar(tmp_path / "a.tar", files | labels)
    found = find_media(str(tmp_path / "a.tar"))
    assert {file.key: file.label for file in found.files} == {"photo_v1": 1, "photo_v1.1": 2, "x.y/b.2024": 3}
    assert [file.read() for file in found.files] == [RED, BLUE, RED] and not found.left_out


def test_links_inside_a_tar(tmp_path: Path) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in (("pool/1.png", RED), ("pool/1.cls", b"5")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, kind, target in (
            ("2.png", tarfile.LNKTYPE, "pool/1.png"),
            ("2.cls", tarfile.LNKTYPE, "./pool/1.cls"),
            ("x/3.png", tarfile.SYMTYPE, "../2.png"),
            ("x/3.cls", tarfile.SYMTYPE, "../pool/1.cls"),
            ("4.png", tarfile.SYMTYPE, "/elsewhere/4.png"),
            ("5.png", tarfile.SYMTYPE, "5.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    (tmp_path / "a.tar").write_bytes(content.getvalue())
    found = find_media(str(tmp_path / "a.tar"))
    assert [(file.key, file.label) for file in found.files] == [("pool/1", 5), ("2", 5), ("x/3", 5)]
    assert [file.read() for file in found.files] == [RED] * 3
    assert tally(found) == {"links to what is not in the tar": (2, "a.tar:4.png", True)}


def test_rows_of_a_list(tmp_path: Path) -> None:
    put(tmp_path, "1.png")
    rows = [{"path": "1.png"}, {"path": "a.gif"}, {"path": "b.gif"}, {"path": "notes.txt"}]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = find_media(str(tmp_path / "list.jsonl"))
    assert tally(found) == {
        ".gif files, a format that is not read": (2, "list.jsonl, line 2: 'a.gif'", True),
        ".txt files": (1, "list.jsonl, line 4: 'notes.txt'", True),  # whatever it is, the list names it
    }


def test_an_input_without_media_says_what_it_holds(tmp_path: Path) -> None:
    put(tmp_path, "a.gif", "b.gif")
    with pytest.raises(DataError, match=r"no images or videos in .* \(2 \.gif files, .* \(the first: .*a\.gif\)\): it"):
        find_media(str(tmp_path))


def test_suffixes_beyond_number_are_counted_together(tmp_path: Path) -> None:
    put(tmp_path, "a.png", *(f"{i}.q{i}" for i in range(60)))
    found = find_media(str(tmp_path))
    assert len(found.left_out) == 51 and found.ignored == 60
    assert found.left_out[0].kind == "other files that may be images or videos" and found.left_out[0].number == 10
