"""Captions, labels and lists as people's editors write them."""

import codecs
import json
from pathlib import Path

import pytest

from rdm_scale.encoding.inputs import MediaSet, find_media
from rdm_scale.encoding.plain_text import decode_plain_text
from rdm_scale.errors import DataError
from tests.support.media_files import RED, write_tar

TEXT = "Größe: 1 café, naïve"
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"]


def as_written(text: str, encoding: str) -> bytes:
    return text.replace("\n", "\r\n").encode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_texts_of_editors(encoding: str, tmp_path: Path) -> None:
    legacy = encoding == "cp1252"
    assert decode_plain_text(as_written(TEXT, encoding)) == (TEXT, legacy)
    folder, rows = tmp_path / "folder", []
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(RED)
        (folder / f"{i}.txt").write_bytes(as_written(f"{TEXT} {i}\n", encoding if i == 1 else "utf-8"))
        rows.append(json.dumps({"path": f"{i}.png", "caption": f"{TEXT} {i}"}, ensure_ascii=False))
    (folder / "list.jsonl").write_bytes(as_written("\n".join(rows) + "\n", encoding))
    members = {f"{i}.png": RED for i in range(3)}
    notes = [as_written(json.dumps({"caption": f"{TEXT} {i}"}, ensure_ascii=False), encoding) for i in range(3)]
    write_tar(tmp_path / "a.tar", members | {f"{i}.txt": (folder / f"{i}.txt").read_bytes() for i in range(3)})
    write_tar(tmp_path / "b.tar", members | {f"{i}.json": note for i, note in enumerate(notes)})
    for source, number in ((folder, 1), (folder / "list.jsonl", 3), (tmp_path / "a.tar", 1), (tmp_path / "b.tar", 3)):
        found = find_media(str(source))
        assert [file.caption for file in found.files] == [f"{TEXT} {i}" for i in range(3)]
        assert len(found.notes) == legacy
        if legacy:
            assert found.notes[0].startswith(f"{number} texts are not UTF-8 and were read as Windows-1252")


@pytest.mark.parametrize(
    "content",
    [
        "кошка на крыше".encode("cp1251"),
        "屋根の上の猫".encode("shift-jis"),
        "屋顶上的猫".encode("gbk"),
        b"\xff\xfea",  # UTF-16 that is cut
        b"a\0b\0\0c",
        b"\x81\x8d",  # not in Windows-1252
        b"caf\xe9 \x01",
    ],
)
def test_what_cannot_be_decoded_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(RED)
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.txt cannot be decoded as UTF-8, UTF-16 or Windows-1252: it must hold a"):
        find_media(str(tmp_path))
    if content.startswith(codecs.BOM_UTF16_LE):  # inside a line it is no mark
        return
    (tmp_path / "list.jsonl").write_bytes(b'{"path": "a.png"}\n{"path": "b.png", "caption": "' + content + b'"}\n')
    with pytest.raises(DataError, match=r"list\.jsonl, line 2 is not JSON"):
        find_media(str(tmp_path / "list.jsonl"))


def test_a_list_in_utf_16_that_is_damaged_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_bytes(codecs.BOM_UTF16_LE + '{"path": "a.png"}\n'.encode("utf-16-le") + b"a")
    with pytest.raises(DataError, match=r"list\.jsonl is damaged: .*truncated data; write it anew, in UTF-8"):
        find_media(str(tmp_path / "list.jsonl"))


def labeled(folder: Path, names: list[str]) -> str:
    members = {f"{i}.png": RED for i in range(len(names))} | {f"{i}.cls": n.encode() for i, n in enumerate(names)}
    write_tar(folder / "a.tar", members)
    return str(folder / "a.tar")


def labels_of(source: MediaSet) -> dict[str, int]:
    return {source.class_names[file.label]: file.label for file in source.files}


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_a_marked_label_is_the_number_that_it_holds(mark: bytes, tmp_path: Path) -> None:
    members = {f"{i}.png": RED for i in range(12)}
    write_tar(tmp_path / "a.tar", members | {f"{i}.cls": mark * (i == 5) + b"%d\n" % i for i in range(12)})
    found = find_media(str(tmp_path / "a.tar"))
    assert {file.key: file.label for file in found.files} == {str(i): i for i in range(12)}


@pytest.mark.parametrize("odd", ["dog", "-1", "5 0", "1.5"])
def test_one_odd_label_does_not_decide_for_all(odd: str, tmp_path: Path) -> None:
    url = labeled(tmp_path, [*map(str, range(11)), odd])
    with pytest.raises(
        DataError, match=rf"11 of 12 classes are numbers, but '{odd}' \(.*:11\.png\) is not: correct it, or give"
    ):
        find_media(url)
    assert (
        labels_of(find_media(url, class_order="numeric"))["10"] > labels_of(find_media(url, class_order="numeric"))["9"]
    )
    assert labels_of(find_media(url, class_order="text"))["10"] < labels_of(find_media(url, class_order="text"))["9"]


def test_a_few_numbers_among_names_are_names(tmp_path: Path) -> None:
    found = find_media(labeled(tmp_path, ["90", "cat", "dog", "seven"]))
    assert found.class_names == ("90", "cat", "dog", "seven")
    assert found.notes == (
        f"1 of 4 classes are numbers, but 'cat' ({tmp_path}/a.tar:1.png) is not: all are taken as names, numbered in "
        "their order",
    )


def test_the_order_of_numbered_folders_is_said(tmp_path: Path) -> None:
    for name in ("1", "2", "9", "10"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(RED)
    found = find_media(str(tmp_path))
    assert found.class_names == ("1", "10", "2", "9")
    (note,) = found.notes
    assert "in the order of their names as text, '10' before '2'; --class-order numeric takes" in note
    found = find_media(str(tmp_path), class_order="numeric")
    assert found.class_names == ("1", "2", "9", "10") and found.notes == ()
    assert [(file.key, file.label) for file in found.files] == [("1/a", 0), ("10/a", 3), ("2/a", 1), ("9/a", 2)]
    assert find_media(str(tmp_path), class_order="text").notes == ()


def test_classes_that_differ_in_case_only_are_said(tmp_path: Path) -> None:
    (note,) = find_media(labeled(tmp_path, ["cat", "Dog", "dog"])).notes
    assert note == (
        "'Dog' and 'dog' are two classes, although their names differ in case or form only; rename one if they are the "
        "same"
    )
