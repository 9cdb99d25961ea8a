"""Untrusted indices: damaged, impossible and malicious ones are refused with the reason."""

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

Contents = dict[str, Any]  # arrays of an index by name, and its JSON metadata as `header`


def set_header(key: str, value: Any) -> Callable[[Contents], None]:
    return lambda contents: contents["header"].update({key: value})


def set_element(array: str, place: Any, value: int) -> Callable[[Contents], None]:
    return lambda contents: contents[array].__setitem__(place, value)


def replace(array: str, change: Callable[[Any], Any]) -> Callable[[Contents], None]:
    return lambda contents: contents.update({array: change(contents[array])})


HUGE = 2**59
HOSTILE = {
    "a header beyond the file": (set_header("header_bytes", HUGE), "do not make a file"),
    "no state entry": (set_header("fields", []), "fields: List should have at least 1 item"),
    "a state entry twice": (set_header("fields", ["ema"] * 4), "occurs twice"),
    "an additional state entry": (set_header("fields", ["a", "b", "c", "d", "e"]), "do not make a file"),
    "an impossible name of a state entry": (set_header("fields", ["../ema"]), "fields.0"),
    "another format": (set_header("format", "pickle"), "format"),
    "another version": (set_header("version", 1), "version"),
    "an unknown key": (set_header("code", "import os"), "code"),
    "no header": (lambda c: c.update(header=None), "Invalid JSON"),
    "a missing checksum": (replace("blocks", lambda a: a[1:]), "number of checksums"),
    "no checksums": (lambda c: c.pop("blocks"), "lacks blocks"),
    "an additional array": (lambda c: c.update(code=np.zeros(3, np.uint8)), "code is not an array of an index"),
    "floats": (replace("pieces", lambda a: a.astype(np.float64)), "pieces is not an array of an index, or has another"),
    "smaller integers": (replace("shapes", lambda a: a.astype(np.int32)), "shapes is not an array of an index"),
    "a missing dimension": (replace("pieces", lambda a: a.ravel()), "pieces is not an array of an index"),
    "too many dimensions": (replace("shapes", lambda a: np.repeat(a[-1:] * 0, 65, axis=0)), "dimensions"),
    "no dimensions": (replace("shapes", lambda a: a[:0]), "dimensions"),
    "a missing shape": (replace("shapes", lambda a: a[:, 1:].copy()), "dimensions"),
    "a missing name": (replace("names", lambda a: a[6:]), "dimensions"),
    "a name twice": (replace("names", lambda a: np.frombuffer(bytes(a).replace(b"out", b"qkv"), np.uint8)), "twice"),
    "names that are not UTF-8": (set_element("names", 0, 255), "utf-8"),
    "a missing row of slices": (replace("pieces", lambda a: a[:-1]), "other dimensions"),
    "a slice of no tensor": (set_element("pieces", (0, 0), 99), "tensor that does not exist"),
    "a slice of a tensor before the first": (set_element("pieces", (0, 0), -1), "tensor that does not exist"),
    "a slice beyond its tensor": (set_element("pieces", (-1, -1), HUGE), "beyond its tensor"),
    "an offset beyond its tensor": (set_element("pieces", (1, 2), HUGE), "beyond its tensor"),
    "an offset that wraps around": (set_element("pieces", (1, 2), 2**63 - 1), "beyond its tensor"),
    "an empty slice": (set_element("pieces", (5, 2), 0), "beyond its tensor"),
    "a negative offset": (set_element("pieces", (1, 2), -1), "beyond its tensor"),
    "a huge tensor": (set_element("shapes", (slice(0, 2), 1), HUGE), "impossible shape"),
    "a tensor too large for floats": (replace("shapes", lambda a: np.full((64, a.shape[1]), HUGE)), "impossible shape"),
    "a negative dimension": (set_element("shapes", (0, 1), -13), "impossible shape"),
    "an empty tensor": (set_element("shapes", (0, 2), 0), "impossible shape"),
    "too few elements": (replace("pieces", lambda a: a[:, 1:].copy()), "do not make a file"),
    "more elements than bytes": (replace("pieces", lambda a: np.concatenate([a, a], axis=1)), "do not make a file"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_index_is_refused(tmp_path: Path, name: str) -> None:
    """The checksum of the index is valid."""
    change, reason = HOSTILE[name]
    data, _ = write(Location(tmp_path), LAYOUTS["1"])
    contents = index_contents(tmp_path)
    change(contents)
    with pytest.raises(CheckpointError, match=rf"rank_00000.index.safetensors is not a valid index: .*{reason}"):
        TensorReader(Location(tmp_path), [data, replace_index(tmp_path, contents)])


@pytest.mark.parametrize("position", [0, 3, 9, 40, 100, -1])
def test_an_index_that_is_not_safetensors_is_refused(tmp_path: Path, position: int) -> None:
    data, entry = write(Location(tmp_path), LAYOUTS["1"])
    content = bytearray((tmp_path / entry.name).read_bytes())
    content[position] ^= 0x80
    content = content[:-1] if position == -1 else content
    with pytest.raises(CheckpointError, match=r"rank_00000.index.safetensors is not a valid index"):
        TensorReader(Location(tmp_path), [data, write_index(tmp_path, bytes(content))])


def test_an_index_whose_metadata_are_null_is_refused(tmp_path: Path) -> None:
    data, entry = write(Location(tmp_path), LAYOUTS["1"])
    content = (tmp_path / entry.name).read_bytes()
    size = int.from_bytes(content[:8], "little")
    text = json.dumps(json.loads(content[8 : 8 + size]) | {"__metadata__": None}).encode().ljust(size)
    assert len(text) == size
    with pytest.raises(CheckpointError, match=r"rank_00000.index.safetensors is not a valid index"):
        TensorReader(Location(tmp_path), [data, write_index(tmp_path, content[:8] + text + content[8 + size :])])


def index_contents(folder: Path) -> Contents:
    path = folder / "rank_00000.index.safetensors"
    with safe_open(path, "np") as file:
        header = json.loads(file.metadata()["rdm_scale"])
    return {name: array.copy() for name, array in load_file(path).items()} | {"header": header}


def replace_index(folder: Path, contents: Contents) -> FileRecord:
    header = contents.pop("header")
    arrays = {name: np.ascontiguousarray(array) for name, array in contents.items()}
    return write_index(folder, save(arrays, None if header is None else {"rdm_scale": json.dumps(header)}))


def write_index(folder: Path, encoded: bytes) -> FileRecord:
    (folder / "rank_00000.index.safetensors").write_bytes(encoded)
    return FileRecord(name="rank_00000.index.safetensors", bytes=len(encoded), xxh3=digest(encoded))


def test_a_hostile_size_is_refused_before_reading(tmp_path: Path) -> None:
    data, entry = write(Location(tmp_path), LAYOUTS["1"])
    with pytest.raises(CheckpointError, match="an index has at most"):
        TensorReader(Location(tmp_path), [data, entry.model_copy(update={"bytes": 2**40})])
    with pytest.raises(CheckpointError, match="not part of the checkpoint"):
        TensorReader(Location(tmp_path), [entry])


def test_no_memory_is_allocated_for_a_tensor_without_bytes(tmp_path: Path) -> None:
    data, _ = write(Location(tmp_path), LAYOUTS["1"])
    contents = index_contents(tmp_path)
    contents["names"] = np.frombuffer(bytes(contents["names"]) + b"\nhuge", np.uint8)
    contents["shapes"] = np.concatenate([contents["shapes"], [[2**58], [0], [0], [0]]], axis=1)
    reader = TensorReader(Location(tmp_path), [data, replace_index(tmp_path, contents)])
    with pytest.raises(CheckpointError, match="lacks elements of huge"):
        reader.read("ema", "huge")
