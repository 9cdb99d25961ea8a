"""The untrusted files of a codec: a configuration and safetensors of bounded size, never pickled weights."""

import hashlib
from dataclasses import dataclass
from typing import Any

from rdm_scale.errors import DataError
from rdm_scale.storage.json_files import read_json_object
from rdm_scale.storage.location import Location
from rdm_scale.storage.safetensors_folder import weight_files

_STEM = "diffusion_pytorch_model"
CONFIG, WEIGHTS = "config.json", f"{_STEM}.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # of weights in several files
_MAX_CONFIG_BYTES = 2**20
_MAX_INDEX_BYTES = 2**24
_MAX_WEIGHTS_BYTES = 2**36


@dataclass(frozen=True)
class CodecFiles:
    """Content of a codec's folder.

    Attributes:
        kind: class name of the model.
        config: its configuration.
        weights: content of each weight file, in the order of their names.
    """

    kind: str
    config: dict[str, Any]
    weights: tuple[bytes, ...]

    @property
    def digest(self) -> str:
        """sha256 of the concatenated weight files."""
        digest = hashlib.sha256()
        for content in self.weights:
            digest.update(content)
        return digest.hexdigest()


def read_files(folder: Location) -> CodecFiles:
    """The files of the codec in a folder.

    Raises:
        DataError: the folder does not exist, has no or only pickled weights, or a file cannot be read or is too large.
    """
    try:
        if not folder.is_dir() or not (folder / CONFIG).exists():
            raise DataError(
                f"there is no codec {folder}: use identity, digits, or a folder with a VAE of diffusers "
                f"({CONFIG} and {WEIGHTS})"
            )
        files = weight_files(folder, _STEM, DataError, _MAX_INDEX_BYTES)
        total = sum((folder / name).size() for name in files)
        if total > _MAX_WEIGHTS_BYTES:
            raise DataError(
                f"the weights in {folder} have {total:,} bytes, and at most {_MAX_WEIGHTS_BYTES:,} are loaded: check "
                "that it is the folder of a VAE"
            )
        config = read_json_object(folder / CONFIG, DataError, _MAX_CONFIG_BYTES)
        kind = str(config.get("_class_name"))
        return CodecFiles(kind, config, tuple((folder / name).read() for name in files))
    except OSError as error:
        raise DataError(f"cannot read the codec {folder}: {error}") from None
