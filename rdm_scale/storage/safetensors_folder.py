"""Safetensors files on any file system: one file, or several with an index in the format of Hugging Face.

Reading and writing hold one tensor in memory at a time. Files are untrusted: the sizes in a header are
checked against the size of the file before anything is allocated. Pickled weights, which could run code, are refused.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rdm_scale.dtypes import SAFETENSORS_DTYPES
from rdm_scale.errors import CheckpointError, RdmError
from rdm_scale.storage.json_files import MAX_JSON_BYTES, read_json_object
from rdm_scale.storage.location import Location

_NAMES = {dtype.torch: name for name, dtype in SAFETENSORS_DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # as in safetensors itself
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_SHOWN_NAMES = 8

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Entry:
    """One tensor of a file: its element type, shape, and range of bytes."""

    file: Location
    dtype: torch.dtype
    shape: Shape
    offset: int  # from the beginning of the file
    bytes: int


class SafetensorsReader:
    """Reader of the tensors of one or several safetensors files.

    Attributes:
        shapes: of all tensors, by name.

    Raises:
        CheckpointError: a file is missing or truncated, or its header is invalid; says which and why.
    """

    def __init__(self, files: Sequence[Location]) -> None:
        self._entries: dict[str, _Entry] = {}
        for file in files:
            for name, entry in _read_header(file).items():
                if name in self._entries:
                    raise CheckpointError(f"{name} is in {self._entries[name].file} and in {file}")
                self._entries[name] = entry
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    @staticmethod
    def of_folder(folder: Location, stem: str) -> "SafetensorsReader":
        """A reader of the weights in a folder, see `weight_files`."""
        return SafetensorsReader([folder / name for name in weight_files(folder, stem, CheckpointError).names])

    def read(self, name: str) -> Tensor:
        """Read a tensor in its stored dtype. Raises CheckpointError: it cannot be read."""
        entry = self._entries[name]
        try:
            content = bytearray(entry.file.read_range(entry.offset, entry.bytes))
        except OSError as error:
            raise CheckpointError(f"cannot read {entry.file}: {error.strerror or error}") from error
        if len(content) != entry.bytes:
            raise CheckpointError(f"{entry.file} is truncated: it ends within {name}")
        return torch.frombuffer(content, dtype=entry.dtype).view(entry.shape)


class WeightFiles(NamedTuple):
    """Files in a folder that hold the weights of a model.

    Attributes:
        names: of the safetensors files, sorted.
        index_name: name of the index of several files; None for one file.
    """

    names: list[str]
    index_name: str | None


def weight_files(
    folder: Location, stem: str, error: type[RdmError], max_index_bytes: int = MAX_JSON_BYTES
) -> WeightFiles:
    """Find the files in a folder that hold the weights `stem`.

    That is `stem`.safetensors, or else the files that `stem`.safetensors.index.json names. Where there is neither, the
    same of the only variant: `stem`.fp16.safetensors, or `stem`.safetensors.index.fp16.json.

    Raises:
        OSError: the folder cannot be listed.
        error: it has none of them, perhaps only pickled weights, or several variants; the index is damaged, or names a
            file outside the folder or one that is missing.
    """
    names = folder.names()
    single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    if single not in names and index not in names:
        single, index = _only_variant(folder, names, stem, error)
    if single in names:
        return WeightFiles([single], None)
    place = folder / index
    weight_map = read_json_object(place, error, max_index_bytes).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise error(f"{place} has no weight_map from names of tensors to files: save the model again")
    files = sorted(set(weight_map.values()))
    if strange := [name for name in files if not _FILE_NAME.fullmatch(name)]:
        raise error(f"{place} names the file {strange[0]!r}: only .safetensors files beside it are read")
    if missing := [name for name in files if name not in names]:
        raise error(f"{folder} lacks {missing[0]}, which {index} names: copy all files of the model")
    return WeightFiles(files, index)


def _only_variant(folder: Location, names: Sequence[str], stem: str, error: type[RdmError]) -> tuple[str, str]:
    """Names of the single file and of the index of the only variant in a folder, of which one exists."""
    singles = re.compile(rf"{re.escape(stem)}\.(\w+)\.safetensors")
    indexes = re.compile(rf"{re.escape(stem)}\.safetensors\.index\.(\w+)\.json")
    found = {match[1] for name in names for match in (singles.fullmatch(name), indexes.fullmatch(name)) if match}
    if len(found) == 1:
        (variant,) = found
        return f"{stem}.{variant}.safetensors", f"{stem}.safetensors.index.{variant}.json"
    single = f"{stem}.safetensors"
    if found:
        raise error(
            f"{folder} has no {single}, but several variants ({', '.join(sorted(found))}): copy the one you want to a "
            "folder of its own, with config.json"
        )
    pickled = [name for name in names if name.endswith(_PICKLED)]
    only = f", only {pickled[0]}, and pickled weights are not loaded because they can run code" if pickled else ""
    raise error(
        f"{folder} has no {single} and no {single}.index.json{only} (it holds {listing(names)}): save the weights as "
        "safetensors, models of diffusers or transformers with save_pretrained(folder, safe_serialization=True)"
    )


def listing(names: Sequence[str]) -> str:
    """Enumeration of the first names in a folder, for a message."""
    shown = ", ".join(sorted(names)[:_SHOWN_NAMES])
    return shown + (f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else "") or "nothing"


def _read_header(file: Location) -> dict[str, _Entry]:
    try:
        size = file.size()
        length = int.from_bytes(file.read_range(0, 8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{file} is not a safetensors file, or is truncated: its header would have {length:,} bytes"
            )
        tree = json.loads(file.read_range(8, length))
        entries = {name: _entry(file, 8 + length, name, v) for name, v in tree.items() if name != "__metadata__"}
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {file}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError, AttributeError) as error:
        raise CheckpointError(f"the header of {file} is damaged: {error}") from None
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        if entry.offset != end:
            raise CheckpointError(f"{file} is damaged: {name} overlaps another tensor, or there is a gap before it")
        end += entry.bytes
    if end != size:
        raise CheckpointError(f"{file} has {size:,} bytes, its header describes {end:,}: it is truncated or damaged")
    return entries


def _entry(file: Location, begin: int, name: str, value: Any) -> _Entry:
    contradiction = ValueError(f"the shape, dtype and data_offsets of {name} contradict each other")
    try:
        shape, (first, last), stored = tuple(value["shape"]), value["data_offsets"], str(value["dtype"])
        integers = all(type(n) is int and 0 <= n < 2**60 for n in (*shape, first, last))
    except KeyError as error:
        raise ValueError(f"the entry of {name} has no {error}") from None
    except TypeError:
        raise contradiction from None
    if stored not in SAFETENSORS_DTYPES:
        raise ValueError(f"{name} has the dtype {stored!r}; supported are {', '.join(SAFETENSORS_DTYPES)}")
    dtype = SAFETENSORS_DTYPES[stored].torch
    if not integers or len(shape) > 64 or math.prod(shape) * dtype.itemsize != last - first or first == last:
        raise contradiction
    return _Entry(file, dtype, shape, begin + first, last - first)


def write_safetensors(
    folder: Location,
    stem: str,
    shapes: Mapping[str, Shape],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    max_file_bytes: int,
    progress: Callable[[int], object] = lambda done: None,
) -> None:
    """Write tensors to `stem`.safetensors or, if that would be too large, to numbered files with an index.

    Args:
        shapes: of all tensors, in the order in which `tensors` yields them.
        dtype: all tensors are converted to it.
        max_file_bytes: size limit of a file; only a larger single tensor exceeds it.
        progress: called with the number of bytes of each tensor written.

    Raises:
        CheckpointError: the files cannot be written.
    """
    plan = _plan_files(shapes, dtype, max_file_bytes)
    total = sum(map(math.prod, shapes.values())) * dtype.itemsize
    pattern = "{stem}.safetensors" if len(plan) == 1 else "{stem}-{number:05d}-of-{count:05d}.safetensors"
    files = [pattern.format(stem=stem, number=i + 1, count=len(plan)) for i in range(len(plan))]
    remaining = iter(tensors)
    try:
        folder.make_dir()
        for file_name, names in zip(files, plan, strict=True):
            with (folder / file_name).open("wb") as file:
                file.write(_header({name: shapes[name] for name in names}, dtype))
                for expected in names:
                    name, tensor = next(remaining)
                    if name != expected or tuple(tensor.shape) != tuple(shapes[name]):
                        raise ValueError(
                            f"got {name} {list(tensor.shape)}, expected {expected} {list(shapes[expected])}"
                        )
                    content = tensor.detach().to(dtype).contiguous().view(-1).view(torch.uint8)
                    file.write(content.numpy().data)
                    progress(content.numel())
                if folder.is_local:
                    file.flush()
                    os.fsync(file.fileno())
        if len(plan) > 1:
            places = {name: file for file, names in zip(files, plan, strict=True) for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": places}
            (folder / f"{stem}.safetensors.index.json").write(json.dumps(index, indent=1).encode())
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error}; it needs {total:,} bytes") from error


def _plan_files(shapes: Mapping[str, Shape], dtype: torch.dtype, max_bytes: int) -> list[list[str]]:
    """The names of the tensors of each file, in order."""
    plan: list[list[str]] = [[]]
    room = max_bytes
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if plan[-1] and size > room:
            plan.append([])
            room = max_bytes
        plan[-1].append(name)
        room -= size
    return plan


def _header(shapes: Mapping[str, Shape], dtype: torch.dtype) -> bytes:
    tree: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        tree[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
