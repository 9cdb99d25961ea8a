"""Folders of text encoders, as written by transformers or sentence-transformers, copied to this machine.

Only known files are read: no Python code, no adapters, and no pickled weights, which could run code. They are copied
(local ones linked) into a temporary folder, so that transformers cannot load any other file.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rdm_scale.errors import DataError
from rdm_scale.storage.json_files import read_json, read_json_object
from rdm_scale.storage.location import Location
from rdm_scale.storage.safetensors_folder import weight_files

Pooling = Literal["mean", "cls", "max"]
_STEM = "model"
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS = f"{_STEM}.safetensors"
INDEX = f"{WEIGHTS}.index.json"
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Of sentence-transformers: the maximum length, and the list of modules.
_LENGTH, _MODULES = "sentence_bert_config.json", "modules.json"
_MAX_JSON_BYTES = 2**27  # tokenizers of 250,000 tokens take 20 MB
_MAX_WEIGHT_BYTES = 2**36
_MAX_LAYERS = 1000
_FOLDER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_CHUNK_BYTES = 2**24
# Keys of configurations that name code, or settings of the process that saved them.
_REMOVED_KEYS = {"auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "dtype"}
_REMOVED_KEYS |= {"torch_dtype", "_name_or_path", "chat_template", "experts_implementation"}
_POOLING_FLAGS: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}


@dataclass(frozen=True)
class TextEncoderFolder:
    """Files of a text encoder in a temporary folder."""

    location: str  # original folder
    path: Path  # temporary folder with config.json, the weights, tokenizer.json and the tokenizer's settings
    config: dict[str, Any]
    weights: tuple[Path, ...]
    pooling: Pooling | None  # None: the folder is not from sentence-transformers
    unit_norm: bool  # True: the pooled vector is normalized to length 1
    max_tokens: int | None  # maximum length of sentence-transformers
    digest: str  # sha256 of weights, tokenizer and pooling


@contextmanager
def text_encoder_folder(url: str, options: Mapping[str, Any] | None = None) -> Iterator[TextEncoderFolder]:
    """Copy the known files of an encoder to a temporary folder, which exists until the end of the `with` block.

    Args:
        url: folder on any fsspec file system.
        options: of the file system, beyond what it takes from the environment.

    Raises:
        DataError: there is no such folder, a file is missing, too large or damaged, or the weights are pickled.
    """
    folder = Location(url, options)
    with tempfile.TemporaryDirectory(prefix="text-encoder-") as temporary:
        try:
            copied = _copy_files(folder, Path(temporary))
        except OSError as error:
            raise DataError(f"cannot read the text encoder {folder}: {error}") from None
        yield copied


def _copy_files(folder: Location, path: Path) -> TextEncoderFolder:
    names = folder.names() if folder.is_dir() else []
    modules = _EncoderModules(folder, pooling=None, unit_norm=False)
    if _MODULES in names:
        modules = _read_modules(folder)
        names = modules.transformer.names()
    transformer = modules.transformer
    if CONFIG not in names:
        raise DataError(
            f"there is no text encoder {transformer}: give a folder that transformers saved ({CONFIG}, ...)"
        )
    if TOKENIZER not in names:
        raise DataError(
            f"{transformer} has no {TOKENIZER}: save the tokenizer into the same folder, "
            "AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    found = weight_files(transformer, _STEM, DataError)
    weights = {WEIGHTS: found.names[0]} if found.index_name is None else {name: name for name in found.names}
    index = {INDEX: found.index_name} if found.index_name else {}
    config = _read_object(transformer / CONFIG)
    _check_config(config, transformer)
    (path / CONFIG).write_text(json.dumps(_without_removed_keys(config)))
    for name in _TOKENIZER_SETTINGS:
        if name in names:
            (path / name).write_text(json.dumps(_without_removed_keys(_read_object(transformer / name))))
    _read_object(transformer / TOKENIZER)  # checks its size and syntax
    left = _MAX_WEIGHT_BYTES
    for name, source in ({TOKENIZER: TOKENIZER} | weights | index).items():  # transformers knows no variants here
        left -= _copy(transformer / source, path / name, left)
    return TextEncoderFolder(
        str(folder),
        path,
        config,
        tuple(path / name for name in weights),
        modules.pooling,
        modules.unit_norm,
        _max_tokens(transformer) if _LENGTH in names else None,
        _digest(path, (TOKENIZER, *weights), f"{modules.pooling} {modules.unit_norm}"),
    )


class _EncoderModules(NamedTuple):
    """Modules of an encoder, which sentence-transformers applies one after the other."""

    transformer: Location
    pooling: Pooling | None
    unit_norm: bool


def _read_modules(folder: Location) -> _EncoderModules:
    modules = read_json(folder / _MODULES, DataError, _MAX_JSON_BYTES)
    kinds: dict[str, str] = {}  # kind of module to its folder
    for module in modules if isinstance(modules, list) else []:
        kind, place = (module.get("type"), module.get("path")) if isinstance(module, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(place, str) or (place and not _FOLDER_NAME.fullmatch(place)):
            raise DataError(f"{folder / _MODULES} has an entry that is not a module: save the model again")
        kinds[kind.rpartition(".")[2]] = place
    if list(kinds) not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise DataError(
            f"{folder / _MODULES} lists {', '.join(kinds) or 'nothing'}: only Transformer, Pooling and, after "
            f"them, Normalize are supported; without {_MODULES} the folder is read as a plain transformers model"
        )
    transformer = folder / kinds["Transformer"] if kinds["Transformer"] else folder
    file = folder / kinds["Pooling"] / CONFIG
    return _EncoderModules(transformer, _pooling(_read_object(file), file), "Normalize" in kinds)


def _pooling(config: dict[str, Any], file: Location) -> Pooling:
    named = config.get("pooling_mode")
    named = [named] if isinstance(named, str) else named
    if not isinstance(named, list):  # before sentence-transformers 5.3: one flag for each mode
        named = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    known = [_POOLING_FLAGS.get(name, name) for name in named]
    if len(known) != 1 or known[0] not in _POOLING_FLAGS.values():
        raise DataError(
            f"{file} has the pooling modes {', '.join(map(str, named)) or 'none'}: "
            f"exactly one of {', '.join(_POOLING_FLAGS)} is supported"
        )
    mode: Pooling = known[0]
    return mode


def _max_tokens(folder: Location) -> int | None:
    value = _read_object(folder / _LENGTH).get("max_seq_length")
    return value if isinstance(value, int) and value > 0 else None


def _check_config(config: dict[str, Any], folder: Location) -> None:
    """Refuse quantized weights, which need other libraries, and an absurd depth, which would take forever to build."""
    if config.get("quantization_config"):
        raise DataError(f"{folder} holds quantized weights: save the text encoder as float32, float16 or bfloat16")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name, value in part.items():
            if "layers" in name and isinstance(value, int | float) and value > _MAX_LAYERS:
                raise DataError(
                    f"{folder / CONFIG}: {name} is {value}, and at most {_MAX_LAYERS} are supported: correct it"
                )


def _without_removed_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_removed_keys(inner) for name, inner in value.items() if name not in _REMOVED_KEYS}
    return value


def _read_object(file: Location) -> dict[str, Any]:
    return read_json_object(file, DataError, _MAX_JSON_BYTES)


def _copy(file: Location, to: Path, limit: int) -> int:
    """Link or copy a file, and return its size."""
    size = file.size()
    if size > limit:
        raise DataError(
            f"{file.parent} has more than {_MAX_WEIGHT_BYTES:,} bytes of weights: use a smaller text encoder"
        )
    if file.is_local:
        to.symlink_to(Path(file.path).resolve())
        return size
    done = 0
    with file.open() as source, to.open("wb") as target:
        while done < size and (chunk := source.read(min(_CHUNK_BYTES, size - done))):
            target.write(chunk)
            done += len(chunk)
    if done < size:
        raise DataError(
            f"{file} ends after {done} of {size} bytes: it was changed while it was in use; run the command again"
        )
    return size


def _digest(path: Path, names: tuple[str, ...], pooling: str) -> str:
    """sha256 of the files and the description of the pooling."""
    digest = hashlib.sha256(pooling.encode())
    for name in names:
        with (path / name).open("rb") as file:
            digest.update(f"\n{name} {(path / name).stat().st_size}\n".encode())
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()
