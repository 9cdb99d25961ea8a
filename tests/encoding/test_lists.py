"""Lists of paths in JSON lines and Parquet: what they name, and what is refused."""

import json

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rdm_scale.encoding.inputs import Columns, find_media
from rdm_scale.encoding.lists import read_list
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location
from tests.support.media_files import BLUE, RED, write_tar


def write_list(path, rows: list[dict]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture
def pictures(tmp_path):
    for name in ("x/1.png", "2.jpg", "elsewhere/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(RED if name.endswith("png") else BLUE)
    fsspec.filesystem("memory").pipe("/inputs_test/4.png", BLUE)
    return tmp_path


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_lists(pictures, kind):
    rows = [
        {"path": "./x/1.png", "label": "cat", "caption": "one"},
        {"path": "2.jpg", "label": "ant", "caption": ""},
        {"path": str(pictures / "elsewhere/3.png"), "label": "cat", "caption": " three "},
        {"path": "memory://inputs_test/4.png", "label": "747", "caption": "four"},
        {"path": "film.gif", "label": "cat", "caption": "not read"},
    ]
    found = find_media(write_list(pictures / f"all.{kind}", rows))
    keys = ["x/1", "2", str(pictures / "elsewhere/3"), "memory://inputs_test/4"]
    assert [file.key for file in found.files] == keys and found.ignored == 1
    assert found.class_names == ("747", "ant", "cat") and [file.label for file in found.files] == [2, 1, 2, 0]
    assert [file.caption for file in found.files] == ["one", "", "three", "four"] and found.captioned
    assert [file.read() for file in found.files] == [RED, BLUE, RED, BLUE]
    assert found.files[3].name == "memory:///inputs_test/4.png"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_of_other_names_numbers_and_keys(pictures, kind):
    rows = [{"file": "x/1.png", "text": "a", "y": 2, "id": i} for i in (5, 6)]  # one image with two captions
    columns = Columns(path="file", label="y", caption="text", key="id")
    url = write_list(pictures / f"all.{kind}", rows)
    found = find_media(url, columns)
    assert [(file.key, file.label, file.caption) for file in found.files] == [("5", 2, "a"), ("6", 2, "a")]
    assert found.class_names == ("0", "1", "2")
    with pytest.raises(DataError, match=r"(line|row) 1 has no 'path'|no column 'path' of paths, only 'file', 'text'"):
        find_media(url)
    with pytest.raises(DataError, match="same key 'x/1': rename one of them, or use a list with a column of keys"):
        find_media(url, Columns(path="file"))
    with pytest.raises(DataError, match="no labels in a column or field 'class'"):
        find_media(url, Columns(path="file", key="id", label="class"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_lists_that_are_refused(pictures, kind):
    good = {"path": "x/1.png", "label": 1, "caption": "a", "key": "k"}
    for row, message in (
        ({"path": None}, "(line|row) 2 has no 'path'"),
        ({"path": ""}, "(line|row) 2: '' in 'path' is not a path"),
        ({"path": "x" * 5000}, "is not a path"),
        ({"label": None}, "1 of 2 images have no class"),
        ({"caption": None}, "1 of 2 images have no caption"),
        ({"label": 10**7}, "class number is not below"),
        ({"label": -2}, "(line|row) 2: -2 in 'label' is not a label"),
        ({"key": None}, "some entries have a 'key' and others do not"),
        ({"key": "k"}, "same key 'k'"),
        ({"key": "a\tb"}, "control character"),
        ({"caption": "x" * 70_000}, "70000 bytes"),
        ({"path": "nosuchscheme://x/1.png"}, "nosuchscheme"),
        ({"path": "a.mp4"}, "both 1 images and 1 videos"),
    ):
        url = write_list(pictures / f"all.{kind}", [good, {**good, "path": "2.jpg", "key": "l"} | row])
        with pytest.raises(DataError, match=message):
            find_media(url)
    with pytest.raises(DataError, match="no images or videos in"):
        find_media(write_list(pictures / f"all.{kind}", [{"path": "a.gif"}]))


def test_files_that_are_no_lists(tmp_path):
    for name, content, message in (
        ("a.jsonl", b"", "no images or videos"),
        ("a.jsonl", b'{"path": "a.png"}\n[1]\n', "line 2 is not a JSON object"),
        ("a.jsonl", b'\n\n{"path": ', "line 3 is not JSON"),
        ("a.jsonl", b"\xff" * 100, "line 1 is not JSON"),
        ("a.jsonl", b"[" * 10**6, "line 1 is not JSON"),
        ("a.jsonl", b"x" * 2**22, "has a line of more than"),
        ("a.parquet", b"", "not a Parquet file"),
        ("a.parquet", b"PAR1" + bytes(1000) + b"PAR1", r"a\.parquet cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            find_media(str(tmp_path / name))


def test_parquet_files_that_hold_the_images_themselves_are_refused(tmp_path):
    table = pa.table({"image": [{"bytes": RED, "path": "a.png"}], "label": [1]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"contain the files themselves \(column 'image'\).*write them as files"):
        find_media(str(tmp_path / "a.parquet"))


def test_a_damaged_parquet_file_and_one_of_huge_row_groups(tmp_path):
    url = write_list(tmp_path / "a.parquet", [{"path": f"{i}.png"} for i in range(1000)])
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[:4] + b"\x00" * 300 + whole[304:])
    with pytest.raises(DataError, match=r"b\.parquet"):
        find_media(str(tmp_path / "b.parquet"))
    assert len(find_media(url).files) == 1000
    with pytest.raises(DataError, match="write it with smaller row groups"):
        list(read_list(Location(url), Columns(), max_column_bytes=1000))


def test_missing_labels_of_pandas_and_categories(pictures):
    table = pa.table(
        {
            "path": pa.array(["x/1.png", "2.jpg"]).dictionary_encode(),
            "label": pa.array([1.0, 0.0]),  # what pandas makes of numbers when one is missing
        }
    )
    pq.write_table(table, pictures / "a.parquet")
    assert [file.label for file in find_media(str(pictures / "a.parquet")).files] == [1, 0]
    pq.write_table(pa.table({"path": ["2.jpg"], "label": [float("nan")]}), pictures / "a.parquet")
    assert find_media(str(pictures / "a.parquet")).class_names == ()


def test_a_glob_of_lists_and_lists_on_other_file_systems(pictures):
    write_list(pictures / "part-0.jsonl", [{"path": "x/1.png"}])
    write_list(pictures / "part-1.jsonl", [{"path": "2.jpg"}])
    assert [file.key for file in find_media(str(pictures / "part-*.jsonl")).files] == ["x/1", "2"]
    write_tar(pictures / "part-2.tar", {"1.png": RED})
    with pytest.raises(DataError, match="both tars and lists"):
        find_media(str(pictures / "part-*"))
    memory = fsspec.filesystem("memory")
    memory.pipe("/inputs_test/lists/a.jsonl", b'{"path": "../4.png"}\n{"path": "memory://inputs_test/4.png"}')
    found = find_media("memory://inputs_test/lists/a.jsonl")
    assert [file.key for file in found.files] == ["../4", "memory://inputs_test/4"]
    assert [file.read() for file in found.files] == [BLUE, BLUE]


def test_addresses_on_the_web(tmp_path):
    rows = [{"path": "https://example.org/a.jpg?size=3"}, {"path": "https://example.org/b.png"}]
    files = find_media(write_list(tmp_path / "a.jsonl", rows)).files
    assert [file.key for file in files] == ["https://example.org/a.jpg?size=3", "https://example.org/b"]
    assert files[0].name == "https://example.org/a.jpg?size=3"


def test_a_long_list_takes_little_memory(tmp_path):
    """Ten million entries must fit: all that is kept of an entry is what is in it, once."""
    import tracemalloc

    count = 20_000
    with (tmp_path / "a.jsonl").open("w") as file:
        for i in range(count):
            file.write(f'{{"path": "{i // 100:04d}/{i:08d}.png", "label": "{i % 10}", "caption": "number {i}"}}\n')
    tracemalloc.start()
    found = find_media(str(tmp_path / "a.jsonl"))
    current, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.files) == count
    assert current < 800 * count and peak < 900 * count
