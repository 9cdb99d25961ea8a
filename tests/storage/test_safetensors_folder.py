"""Safetensors files and indices: false claims are refused before anything is allocated."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rdm_scale.errors import CheckpointError
from rdm_scale.storage.location import Location
from rdm_scale.storage.safetensors_folder import SafetensorsReader


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> list[Location]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return [Location(path)]


def tensor(shape: list[Any], begin: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": tensor([2**50], 0, 2**52)}, 8, "it is truncated or damaged"),
        ({"a": tensor([2], 0, 4)}, 4, "the shape, dtype and data_offsets of a contradict"),
        ({"a": tensor([2, -1], 0, 8)}, 8, "data_offsets of a contradict"),
        ({"a": tensor([2.0], 0, 8)}, 8, "data_offsets of a contradict"),
        ({"a": tensor([True, 2], 0, 8)}, 8, "data_offsets of a contradict"),
        ({"a": tensor([2], 0, 8), "b": tensor([1], 4, 8)}, 8, "b overlaps another tensor"),
        ({"a": tensor([1], 4, 8)}, 8, "there is a gap before it"),
        ({"a": tensor([2], 0, 8, "I99")}, 8, "a has the dtype 'I99'"),
        ({"a": {"dtype": "F32"}}, 8, "the entry of a has no 'shape'"),
        ({"a": 3}, 8, "of a contradict"),
        ([1], 8, "header .* is damaged"),
        (b"\xff{", 8, "header .* is damaged"),
        (b"[" * 100_000, 8, "header .* is damaged"),
        ({"a": tensor([2], 0, 8)}, 9, "its header describes"),
        ({"a": tensor([2], 0, 8)}, 7, "it is truncated or damaged"),
    ],
)
def test_false_headers(tmp_path: Path, header: Any, data: int, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        SafetensorsReader(write(tmp_path / "x.safetensors", header, bytes(data)))


@pytest.mark.parametrize("length", [2**63, 99, 100_000_001])
def test_a_header_of_impossible_length(tmp_path: Path, length: int) -> None:
    with pytest.raises(CheckpointError, match="not a safetensors file, or is truncated"):
        SafetensorsReader(write(tmp_path / "x.safetensors", {}, length=length))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../x.safetensors"}, "names the file '../x.safetensors'"),
        ({"a": "/etc/passwd"}, "only .safetensors files beside it"),
        ({"a": "y.safetensors"}, "lacks y.safetensors"),
        ({"a": 3}, "no weight_map"),
        ([], "no weight_map"),
        ({}, "no weight_map"),
    ],
)
def test_index_that_leaves_the_folder(tmp_path: Path, weight_map: Any, message: str) -> None:
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        SafetensorsReader.of_folder(Location(tmp_path), "m")


def test_pickles_and_duplicates_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"only m\.bin, and pickled weights are not loaded because they can run code"
    ):
        SafetensorsReader.of_folder(Location(tmp_path), "m")
    for name in ("1", "2"):
        save_file({"a": torch.ones(2, dtype=torch.float16)}, tmp_path / f"{name}.safetensors")
    assert torch.equal(SafetensorsReader([Location(tmp_path / "1.safetensors")]).read("a"), torch.ones(2).half())
    with pytest.raises(CheckpointError, match=r"a is in .*1\.safetensors and in .*2\.safetensors"):
        SafetensorsReader([Location(tmp_path / f"{n}.safetensors") for n in (1, 2)])
