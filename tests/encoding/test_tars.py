"""Webdataset tars: media, classes and captions by key, and tars that are refused."""

import json
import tarfile

import pytest

from rdm_scale.encoding.inputs import Columns, find_media
from rdm_scale.errors import DataError
from tests.support.media_files import BLUE, RED, write_tar


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


def test_a_tar_without_classes(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.png": RED, "2.png": RED})
    found = find_media(str(tmp_path / "a.tar"))
    assert found.class_names == () and [image.label for image in found.files] == [-1, -1]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.txt": b"x"}, "no images"),
        ({"1.png": RED, "1.jpg": RED}, "same key '1'"),
        ({"1.png": RED, "1.cls": b"0", "2.png": RED}, "1 of 2 images have no class"),
        ({"1.png": RED, "1.cls": b" "}, "1.cls is empty"),
        ({"1.png": RED, "1.cls": b"\xff\xfe\0"}, "1.cls cannot be decoded"),
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
        (b'{"label": -1}', "-1 in 'label' is not a label"),
        (b'{"label": true}', "True in 'label' is not a label"),
        (b'{"label": [1]}', "is not a label"),
        (b'{"label": ""}', "is not a label"),
        (b'{"label": 1e400}', "is not a label"),
        (b'{"caption": ["a", "b"]}', "is not a caption"),
        (b'{"caption": "' + b"x" * 70_000 + b'"}', "70000 bytes; at most 65536"),
        (b'{"caption": "\\ud800"}', "not valid Unicode"),
    ],
)
def test_json_in_tars_that_is_refused(tmp_path, record, message):
    write_tar(tmp_path / "a.tar", {"1.png": RED, "1.json": record})
    with pytest.raises(DataError, match=message):
        find_media(str(tmp_path / "a.tar"))


def test_sparse_members_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("1.png")
        info.type = tarfile.GNUTYPE_SPARSE
        tar.addfile(info)
    with pytest.raises(DataError, match=r"1\.png is stored as a sparse file"):
        find_media(str(tmp_path / "a.tar"))
