"""The files of a codec, read without trust: a configuration and safetensors, each of a bounded size, never a pickle."""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # of weights in several files
_MAX_JSON_BYTES = 2**20
_MAX_INDEX_BYTES = 2**24
_MAX_WEIGHTS_BYTES = 2**36
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")


@dataclass(frozen=True)
class CodecFiles:
    kind: str  # class of the model
    config: dict[str, Any]
    weights: tuple[bytes, ...]  # of each file of weights, in the order of their names

    @property
    def digest(self) -> str:
        """sha256 of the weights; of several files, of all of them one after the other."""
        digest = hashlib.sha256()
        for content in self.weights:
            digest.update(content)
        return digest.hexdigest()


def read_files(folder: Location) -> CodecFiles:
    """Raises DataError: no such folder, no or only pickled weights, or something cannot be read or is too large."""
    try:
        names = folder.names() if folder.is_dir() else []
        if CONFIG not in names:
            raise DataError(
                f"there is no codec {folder}: give identity, digits, or a folder with a VAE of diffusers "
                f"({CONFIG} and {WEIGHTS})"
            )
        files = _weight_files(folder, names)
        total = sum((folder / name).size() for name in files)
        if total > _MAX_WEIGHTS_BYTES:
            raise DataError(f"the weights in {folder} have {total} bytes: more than any VAE has")
        config = _read_json(folder / CONFIG, _MAX_JSON_BYTES)
        kind = config.get("_class_name") if isinstance(config, dict) else None
        return CodecFiles(str(kind), config, tuple((folder / name).read() for name in files))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read the codec {folder}: {error}") from None


def _weight_files(folder: Location, names: list[str]) -> list[str]:
    if WEIGHTS in names:
        return [WEIGHTS]
    if INDEX in names:
        index = _read_json(folder / INDEX, _MAX_INDEX_BYTES)
        places = index.get("weight_map") if isinstance(index, dict) else None
        files = sorted({str(file) for file in places.values()}) if isinstance(places, dict) else []
        if not files or not all(_SHARD_NAME.fullmatch(file) for file in files):
            raise DataError(f"{folder / INDEX} does not say which .safetensors files beside it hold the weights")
        if missing := [file for file in files if file not in names]:
            raise DataError(f"{folder} lacks {missing[0]}, which its {INDEX} names: copy all files of the VAE")
        return files
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    found = f": only {pickled[0]}, and pickled weights are not loaded because they can run code" if pickled else ""
    raise DataError(f"{folder} has no {WEIGHTS}{found}. Save it with save_pretrained(safe_serialization=True)")


def _read_json(location: Location, limit: int) -> Any:
    if location.size() > limit:
        raise DataError(f"{location} is too large for what it should be ({location.size()} bytes)")
    return json.loads(location.read())
