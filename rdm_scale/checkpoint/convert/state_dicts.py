"""State dicts as other projects' training loops save them: safetensors, or torch's format read without running code."""

import argparse
import contextlib
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rdm_scale.config import Weights
from rdm_scale.errors import CheckpointError
from rdm_scale.storage.location import Location
from rdm_scale.storage.safetensors_folder import SafetensorsReader, Shape

_UNREADABLE = (
    zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, TypeError, OSError,
)  # fmt: skip
# What loops put around the weights: DiT's own saves model, ema, opt and args, others model_state_dict or state_dict.
_HOLDERS: dict[Weights, tuple[str, ...]] = {
    "ema": ("ema", "model", "model_state_dict", "state_dict"),
    "raw": ("model", "model_state_dict", "state_dict", "ema"),
}
# Modules that wrappers put around a model or its blocks: torch.compile, FSDP, activation checkpointing, EMA, DDP.
_WRAPPERS = re.compile(
    r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|ema_model)\.|^(?:module\.)+"
)
_REFUSED_CLASS = re.compile(r"GLOBAL ([\w.]+)")
_MAX_NESTING = 4  # of the keys above
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


class NamedTensors(NamedTuple):
    """Tensors by name, without the names that wrappers of the model added; read on demand."""

    shapes: dict[str, Shape]
    read: Callable[[str], Tensor]


def open_tensors(file: Location, weights: Weights = "ema") -> NamedTensors:
    """Open a .safetensors, .pt or .pth file.

    Args:
        weights: of a training loop's file that holds both, the ones to read.

    Raises:
        CheckpointError: the file is missing, damaged, of another type, or contains pickled objects other than tensors,
            containers and argparse.Namespace.
    """
    if file.name.endswith(".safetensors"):
        reader = SafetensorsReader([file])
        stored = _without_wrappers(reader.shapes, file)
        return NamedTensors(
            {name: reader.shapes[old] for name, old in stored.items()}, lambda n: reader.read(stored[n])
        )
    if not file.name.endswith((".pt", ".pth")):
        raise CheckpointError(f"{file} is neither a folder of diffusers nor a .safetensors, .pt or .pth file")
    tensors = _state_dict(_unpickle(file), weights, file)
    stored = _without_wrappers(tensors, file)
    return NamedTensors({name: tuple(tensors[old].shape) for name, old in stored.items()}, lambda n: tensors[stored[n]])


def _without_wrappers(names: Iterable[str], file: Location) -> dict[str, str]:
    """Stored names by the names without wrappers' prefixes."""
    found: dict[str, str] = {}
    for stored in names:
        name = stored
        while (shorter := _WRAPPERS.sub("", name)) != name:
            name = shorter
        if name in found:
            raise CheckpointError(f"{file} holds {name} twice, as {found[name]} and {stored}: keep one of them")
        found[name] = stored
    return found


def _unpickle(file: Location) -> Any:
    """Read a file in torch's format with its restricted unpickler: tensors, containers and argparse.Namespace.

    A Namespace, which training loops save their options as, only receives attributes. The format before torch 1.6 is
    refused because it allocates whatever size it claims, and so are compressed files, which may expand to any size.
    """
    try:
        with file.open("rb") as content:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in zipfile.ZipFile(content).infolist()):
                raise ValueError("it is compressed; save it again with torch.save")
            content.seek(0)
            with _only_namespaces_allowed():
                return torch.load(content, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {file}: check the path") from None
    except _UNREADABLE as error:
        raise CheckpointError(
            f"{file} is not a plain file of tensors, and nothing else is loaded or executed: {_reason(error)}"
        ) from None


@contextlib.contextmanager
def _only_namespaces_allowed() -> Iterator[None]:
    """Context in which torch's restricted unpickler allows one more class, and none that libraries have added."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)


def _reason(error: Exception) -> str:
    """One sentence for an error of torch.load, whose own message advises to load the file without protection."""
    text = _ESCAPES.sub("", str(error)).strip()
    if refused := _REFUSED_CLASS.search(text):
        return (
            f"it contains an object of the class {refused[1]}. Save the weights alone, with "
            "torch.save(model.state_dict(), ...)"
        )
    return " ".join(text.split())


def _state_dict(found: Any, weights: Weights, file: Location) -> dict[str, Tensor]:
    """The dictionary of names and tensors in what a training loop saved."""
    for _ in range(_MAX_NESTING):
        holders = _HOLDERS[weights] if isinstance(found, dict) else ()
        holder = next((key for key in holders if isinstance(found.get(key), dict)), None)
        found = found if holder is None else found[holder]
    if not isinstance(found, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) and v.layout == torch.strided for k, v in found.items()
    ):
        known = ", ".join(dict.fromkeys(key for keys in _HOLDERS.values() for key in keys))
        raise CheckpointError(
            f"{file} does not hold a dictionary of names and dense tensors, alone or under one of the keys {known}: "
            "save the weights alone, with torch.save(model.state_dict(), ...)"
        )
    return found
