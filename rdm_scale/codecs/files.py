"""The untrusted files of a codec: a configuration and safetensors of bounded size, never pickled weights."""

import hashlib
from dataclasses import dataclass
from typing import Any

from rdm_scale.errors import CheckpointError, DataError
from rdm_scale.storage.json_files import read_json_object
from rdm_scale.storage.location import Location
from rdm_scale.storage.safetensors_folder import SafetensorsReader, listing, weight_files

_STEM = "diffusion_pytorch_model"
CONFIG, WEIGHTS = "config.json", f"{_STEM}.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # of weights in several files
_PIPELINE, _VAE = "model_index.json", "vae"  # of a pipeline of diffusers
_MAX_CONFIG_BYTES = 2**20
_MAX_INDEX_BYTES = 2**24
_MAX_WEIGHTS_BYTES = 2**36


@dataclass(frozen=True)
class CodecFiles:
    """Content of a codec's folder.

    Attributes:
        folder: where they are.
        kind: class name of the model.
        config: its configuration.
        weights: content of each weight file, in the order of their names.
    """

    folder: Location
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


def read_files(place: Location) -> CodecFiles:
    """The files of the codec in a folder, or in the folder `vae` of a pipeline of diffusers.

    Raises:
        DataError: the folder does not exist, has no or only pickled weights, or a file cannot be read or is too large.
    """
    try:
        folder = _vae_folder(place)
        files = weight_files(folder, _STEM, DataError, _MAX_INDEX_BYTES).names
        total = sum((folder / name).size() for name in files)
        if total > _MAX_WEIGHTS_BYTES:
            raise DataError(
                f"the weights in {folder} have {total:,} bytes, and at most {_MAX_WEIGHTS_BYTES:,} are loaded: check "
                "that it is the folder of a VAE"
            )
        config = read_json_object(folder / CONFIG, DataError, _MAX_CONFIG_BYTES)
        if not isinstance(kind := config.get("_class_name"), str):
            raise DataError(
                f"{folder / CONFIG} names no class of diffusers (_class_name), so it is not that of a VAE: give the "
                "folder of one"
            )
        return CodecFiles(folder, kind, config, tuple((folder / name).read() for name in files))
    except OSError as error:
        raise DataError(f"cannot read the codec {place}: {error}") from None


def _vae_folder(place: Location) -> Location:
    """The folder with the configuration of a VAE. Raises DataError: there is none; says what there is instead."""
    if not place.is_dir():
        if place.exists():
            raise DataError(f"the codec {place} is a file: {_single_file(place)}")
        raise DataError(
            f"there is no codec {place}: use identity, digits, or a folder with a VAE of diffusers ({CONFIG} and "
            f"{WEIGHTS}). Models of a hub have to be downloaded first"
        )
    for folder in (place, place / _VAE):
        if (folder / CONFIG).exists():
            return folder
    names = place.names()
    what = f"is a pipeline without a folder {_VAE}" if _PIPELINE in names else f"has no {CONFIG}"
    raise DataError(
        f"there is no codec in {place}: it {what} (it holds {listing(names)}). Give a folder with a VAE of diffusers "
        f"({CONFIG} and {WEIGHTS}), or that of a pipeline with one in {_VAE}/"
    )


def _single_file(file: Location) -> str:
    """Describe a file that was given as a codec, and what to do with it."""
    convert = (
        f'convert it once, with diffusers: AutoencoderKL.from_single_file("{file}", config=MODEL)'
        '.save_pretrained("vae"), where MODEL is the folder or name of the model that it belongs to; then give the '
        "folder vae"
    )
    if not file.name.endswith(".safetensors"):
        return f"a codec is a folder. If it is a checkpoint, {convert}"
    try:
        names = SafetensorsReader([file]).shapes.keys()
    except CheckpointError as error:
        return f"a codec is a folder, and this is no weight file either ({error})"
    if any(name.startswith("encoder.down_blocks.") for name in names):
        return f"weights of diffusers without their {CONFIG}; put both into a folder, the weights as {WEIGHTS}"
    if any(name.startswith("first_stage_model.") for name in names):
        return f"a whole checkpoint of latent diffusion with a VAE inside, but not how to scale its latents; {convert}"
    if any(name.startswith("encoder.down.") for name in names):
        return f"a VAE of latent diffusion, without what says how to scale its latents; {convert}"
    return f"{len(names)} tensors that are no known VAE, such as {min(names, default='none')}; use another file"
