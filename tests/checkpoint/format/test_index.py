"""Indices from elsewhere: what is damaged, impossible or made to harm is refused, and says what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save

from rdm_scale.checkpoint.format.index import FileRecord, digest
from rdm_scale.checkpoint.format.reader import TensorReader
from rdm_scale.errors import CheckpointError
from rdm_scale.storage.location import Location
from tests.support.tensor_layouts import LAYOUTS, write

Contents = dict[str, Any]  # arrays of an index, and `header`: its JSON


def lie(key: str, value: Any) -> Callable[[Contents], None]:
    return lambda contents: contents["header"].update({key: value})


def put(array: str, place: Any, value: int) -> Callable[[Contents], None]:
    return lambda contents: contents[array].__setitem__(place, value)


def replace(array: str, change: Callable[[Any], Any]) -> Callable[[Contents], None]:
    return lambda contents: contents.update({array: change(contents[array])})


HUGE = 2**59
LIES = {
    "a header beyond the file": (lie("header_bytes", HUGE), "do not make a file"),
    "no field": (lie("fields", []), "fields: List should have at least 1 item"),
    "a field twice": (lie("fields", ["ema"] * 4), "occurs twice"),
    "a field more": (lie("fields", ["a", "b", "c", "d", "e"]), "do not make a file"),
    "a field that is none": (lie("fields", ["../ema"]), "fields.0"),
    "another format": (lie("format", "pickle"), "format"),
    "another version": (lie("version", 1), "version"),
    "an unknown key": (lie("code", "import os"), "code"),
    "no header": (lambda c: c.update(header=None), "Invalid JSON"),
    "a checksum less": (replace("blocks", lambda a: a[1:]), "number of checksums"),
    "no checksums": (lambda c: c.pop("blocks"), "lacks blocks"),
    "an array more": (lambda c: c.update(code=np.zeros(3, np.uint8)), "code is no array of an index"),
    "fractions": (replace("pieces", lambda a: a.astype(np.float64)), "pieces is no array of an index, or of another"),
    "smaller integers": (replace("shapes", lambda a: a.astype(np.int32)), "shapes is no array of an index"),
    "a dimension less": (replace("pieces", lambda a: a.ravel()), "pieces is no array of an index"),
    "too many dimensions": (replace("shapes", lambda a: np.repeat(a[-1:] * 0, 65, axis=0)), "dimensions"),
    "no dimensions": (replace("shapes", lambda a: a[:0]), "dimensions"),
    "a shape less": (replace("shapes", lambda a: a[:, 1:].copy()), "dimensions"),
    "a name less": (replace("names", lambda a: a[6:]), "dimensions"),
    "a name twice": (replace("names", lambda a: np.frombuffer(bytes(a).replace(b"out", b"qkv"), np.uint8)), "twice"),
    "names that are no text": (put("names", 0, 255), "utf-8"),
    "a list cut off": (replace("pieces", lambda a: a[:-1]), "other dimensions"),
    "a piece of no tensor": (put("pieces", (0, 0), 99), "of no tensor"),
    "a piece of a tensor before the first": (put("pieces", (0, 0), -1), "of no tensor"),
    "a piece beyond its tensor": (put("pieces", (-1, -1), HUGE), "beyond its tensor"),
    "an offset beyond its tensor": (put("pieces", (1, 2), HUGE), "beyond its tensor"),
    "an offset that wraps around": (put("pieces", (1, 2), 2**63 - 1), "beyond its tensor"),
    "an empty piece": (put("pieces", (5, 2), 0), "beyond its tensor"),
    "a negative offset": (put("pieces", (1, 2), -1), "beyond its tensor"),
    "a huge tensor": (put("shapes", (slice(0, 2), 1), HUGE), "impossible shape"),
    "a tensor beyond all floats": (replace("shapes", lambda a: np.full((64, a.shape[1]), HUGE)), "impossible shape"),
    "a negative dimension": (put("shapes", (0, 1), -13), "impossible shape"),
    "an empty tensor": (put("shapes", (0, 2), 0), "impossible shape"),
    "too few elements": (replace("pieces", lambda a: a[:, 1:].copy()), "do not make a file"),
    "more elements than bytes": (replace("pieces", lambda a: np.concatenate([a, a], axis=1)), "do not make a file"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_hostile_index_is_refused(tmp_path: Path, name: str) -> None:
    """The checksum of the index is right: whoever wrote it meant it."""
    change, reason = LIES[name]
    data, _ = write(Location(tmp_path), LAYOUTS["1"])
    contents = index_contents(tmp_path)
    change(contents)
    with pytest.raises(CheckpointError, match=rf"rank_00000.index.safetensors is not a valid index: .*{reason}"):
        TensorReader(Location(tmp_path), [data, replace_index(tmp_path, contents)])


@pytest.mark.parametrize("position", [0, 3, 9, 40, 100, -1])
def test_an_index_that_is_no_safetensors_is_refused(tmp_path: Path, position: int) -> None:
    data, entry = write(Location(tmp_path), LAYOUTS["1"])
    content = bytearray((tmp_path / entry.name).read_bytes())
    content[position] ^= 0x80
    content = content[:-1] if position == -1 else content
    with pytest.raises(CheckpointError, match=r"rank_00000.index.safetensors is not a valid index"):
        TensorReader(Location(tmp_path), [data, put_index(tmp_path, bytes(content))])


def test_an_index_whose_metadata_are_null_is_refused(tmp_path: Path) -> None:
    data, entry = write(Location(tmp_path), LAYOUTS["1"])
    content = (tmp_path / entry.name).read_bytes()
    size = int.from_bytes(content[:8], "little")
    text = json.dumps(json.loads(content[8 : 8 + size]) | {"__metadata__": None}).encode().ljust(size)
    assert len(text) == size
    with pytest.raises(CheckpointError, match=r"rank_00000.index.safetensors is not a valid index"):
        TensorReader(Location(tmp_path), [data, put_index(tmp_path, content[:8] + text + content[8 + size :])])


def index_contents(folder: Path) -> Contents:
    path = folder / "rank_00000.index.safetensors"
    with safe_open(path, "np") as file:
        header = json.loads(file.metadata()["rdm_scale"])
    return {name: array.copy() for name, array in load_file(path).items()} | {"header": header}


def replace_index(folder: Path, contents: Contents) -> FileRecord:
    header = contents.pop("header")
    arrays = {name: np.ascontiguousarray(array) for name, array in contents.items()}
    return put_index(folder, save(arrays, None if header is None else {"rdm_scale": json.dumps(header)}))


def put_index(folder: Path, encoded: bytes) -> FileRecord:
    (folder / "rank_00000.index.safetensors").write_bytes(encoded)
    return FileRecord(name="rank_00000.index.safetensors", bytes=len(encoded), xxh3=digest(encoded))


def test_a_hostile_size_is_refused_before_reading(tmp_path: Path) -> None:
    data, entry = write(Location(tmp_path), LAYOUTS["1"])
    with pytest.raises(CheckpointError, match="larger than an index can be"):
        TensorReader(Location(tmp_path), [data, entry.model_copy(update={"bytes": 2**40})])
    with pytest.raises(CheckpointError, match="no part of the checkpoint"):
        TensorReader(Location(tmp_path), [entry])


def test_a_claimed_tensor_without_bytes_takes_no_memory(tmp_path: Path) -> None:
    data, _ = write(Location(tmp_path), LAYOUTS["1"])
    contents = index_contents(tmp_path)
    contents["names"] = np.frombuffer(bytes(contents["names"]) + b"\nhuge", np.uint8)
    contents["shapes"] = np.concatenate([contents["shapes"], [[2**58], [0], [0], [0]]], axis=1)
    reader = TensorReader(Location(tmp_path), [data, replace_index(tmp_path, contents)])
    with pytest.raises(CheckpointError, match="hole: of huge"):
        reader.read("ema", "huge")
