"""Identity of inputs: what of a listing decides that an input has changed, and how changes are said."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from rdm_scale.encoding.inputs import find_media
from rdm_scale.encoding.inventory import InputChanges, Inventory
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location
from tests.support.media_files import BLUE, RED, write_tar


def listed(url: Path) -> Inventory:
    return Inventory.of(find_media(str(url)))


def touch(path: Path, content: bytes, seconds: int) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (seconds, seconds))


def test_changes_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for name in "abcd":
        touch(folder / f"{name}.png", RED, 1000)
    before = listed(folder)
    assert listed(folder).digest == before.digest and before.changes_to(listed(folder)) == InputChanges([], [], 0)
    touch(folder / "a.png", RED, 2000)  # another time
    touch(folder / "c.png", RED + b"x", 1000)  # another size
    touch(folder / "e.png", RED, 1000)
    (folder / "b.png").rename(folder / "b.jpg")  # another file of the same key
    (folder / "d.png").unlink()
    after, source = listed(folder), find_media(str(folder))
    changes = before.changes_to(after)
    assert [source.files[i].key for i in changes.changed] == ["a", "b", "c"] and after.digest != before.digest
    assert [source.files[i].key for i in changes.new] == ["e"] and changes.gone == 1
    assert changes.describe(source) == (
        f"3 changed (the first: {folder}/a.png), 1 new ({folder}/e.png), 1 no longer there"
    )


def test_a_folder_that_is_moved_stays_the_same(tmp_path: Path) -> None:
    touch(tmp_path / "in/a.png", RED, 1000)
    before = listed(tmp_path / "in")
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    after = listed(tmp_path / "elsewhere")
    assert before.changes_to(after) == InputChanges([], [], 0)
    assert (before.place, after.place) == (f"{tmp_path}/in", f"{tmp_path}/elsewhere")


def test_tars_and_captions(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"1.png": RED, "1.txt": b"one", "2.png": RED, "2.txt": b"two"})
    os.utime(tmp_path / "a.tar", (1000, 1000))
    before = listed(tmp_path / "a.tar")
    write_tar(tmp_path / "a.tar", {"1.png": RED, "1.txt": b"eno", "2.png": RED, "2.txt": b"two"})
    os.utime(tmp_path / "a.tar", (1000, 1000))
    assert before.changes_to(listed(tmp_path / "a.tar")).changed == [0]
    os.utime(tmp_path / "a.tar", (2000, 1000))
    assert before.changes_to(listed(tmp_path / "a.tar")).changed == [0]  # only its time of access differs
    os.utime(tmp_path / "a.tar", (2000, 2000))
    assert before.changes_to(listed(tmp_path / "a.tar")).changed == [0, 1]


@pytest.mark.parametrize("files", [3, 30])  # looked up one by one, or by a listing of their folder
def test_files_behind_a_list(tmp_path: Path, memory: Location, files: int) -> None:
    for place in (str(memory), "pool"):
        for i in range(files):
            (memory / f"{i}.png").write(RED)
            touch(tmp_path / f"pool/{i}.png", RED, 1000)
        rows = [{"path": f"{place}/{i}.png", "key": str(i)} for i in range(files)]
        (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        before = listed(tmp_path / "list.jsonl")
        assert all(file.length == len(RED) for file in find_media(str(tmp_path / "list.jsonl")).files)
        (memory / "1.png").write(BLUE)
        touch(tmp_path / "pool/1.png", RED, 2000)
        (memory / "2.png").remove()
        (tmp_path / "pool/2.png").unlink()
        assert before.changes_to(listed(tmp_path / "list.jsonl")).changed == [1, 2]
        (tmp_path / "list.jsonl").write_text(json.dumps({"path": f"{place}/2.png", "key": "0"}))
        assert before.changes_to(listed(tmp_path / "list.jsonl")) == InputChanges([0], [], files - 1)


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    touch(tmp_path / "in/a.png", RED, 1000)
    inventory, work = listed(tmp_path / "in"), Location(tmp_path / "out/.encoding")
    (tmp_path / "out/.encoding").mkdir(parents=True)
    assert Inventory.read(work) is None
    inventory.write(work)
    found = Inventory.read(work)
    assert found is not None and found.digest == inventory.digest and found.place == f"{tmp_path}/in"
    assert found.keys.dtype == np.uint64 and found.changes_to(inventory) == InputChanges([], [], 0)
    file = tmp_path / "out/.encoding/inputs.safetensors"
    whole = file.read_bytes()
    for content in (b"", whole[:20], whole[:-3]):
        file.write_bytes(content)
        with pytest.raises(DataError, match=rf"inputs\.safetensors is damaged .*: remove {tmp_path}/out and encode"):
            Inventory.read(work)
