"""Loading of codecs by name, or by the record in a manifest."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rdm_scale.codecs.codec import LatentCodec
from rdm_scale.codecs.files import CONFIG, CodecFiles, read_files
from rdm_scale.codecs.record import CodecRecord
from rdm_scale.codecs.vaes import IDENTITY_GEOMETRY, VAES, Normalization, Vae
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location

DIGITS_FOLDER = Path(__file__).parent / "digits_vae"


def load_codec(name: str, device: str | torch.device = "cpu") -> LatentCodec:
    """Load the codec `identity` or `digits`, or the one in the folder (path or URL) `name`.

    Raises:
        DataError: no such folder, a model of an unknown class, damaged or pickled weights.
    """
    return _load(name, torch.device(device), recorded=None)


def codec_of(record: CodecRecord, device: str | torch.device = "cpu", location: str | None = None) -> LatentCodec:
    """Load the codec that encoded a data set, from its recorded location or, if it has moved, from `location`.

    It normalizes as recorded, even if the configuration beside the weights has changed since.

    Raises:
        DataError: as `load_codec`, or the weights there are not those that the data was encoded with.
    """
    return _load(location or record.location, torch.device(device), record)


def _load(name: str, device: torch.device, recorded: CodecRecord | None) -> LatentCodec:
    if name == "identity":
        record = _checked(CodecRecord(name="identity", location="identity"), recorded)
        return LatentCodec(record, IDENTITY_GEOMETRY, _identity, _identity, device, has_posterior=False)
    files = read_files(Location(DIGITS_FOLDER if name == "digits" else name))
    folder = files.folder
    if files.kind not in VAES:
        raise DataError(
            f"{folder} holds a {files.kind}, which is not supported: use identity, digits, or one of the VAEs "
            f"{', '.join(VAES)}"
        )
    digest = files.digest
    if recorded is not None and digest != recorded.digest:
        raise DataError(
            f"the weights in {folder} are not those that the data was encoded with (sha256 {digest}, the manifest "
            f"says {recorded.digest or 'none'}): restore the old weights or encode the data again"
        )
    known = VAES[files.kind]
    model = _build(folder, files)
    geometry = known.geometry(model)
    shift, scale = _normalization(folder, known, model, geometry.channels)
    kind, location = ("digits", "digits") if name == "digits" else (files.kind, str(folder))
    found = CodecRecord(name=kind, location=location, digest=digest, shift=tuple(shift), scale=tuple(scale))
    model.to(device).eval().requires_grad_(False)
    return LatentCodec(
        _checked(found, recorded),
        geometry,
        lambda pixels: known.encode(model, pixels),
        lambda raw: known.decode(model, raw),
        device,
        has_posterior=known.has_posterior,
    )


def _checked(found: CodecRecord, recorded: CodecRecord | None) -> CodecRecord:
    """`recorded`, after checking that it describes the codec that was found; without a record, `found`."""
    if recorded is None:
        return found
    if (found.name, found.digest) != (recorded.name, recorded.digest):
        raise DataError(
            f"the data was encoded with the codec {recorded.name}, but {found.location} is another codec: give the "
            "location of the one in the manifest"
        )
    return recorded


def _identity(values: Tensor) -> Tensor:
    return values


def _build(folder: Location, files: CodecFiles) -> Any:
    """Build the model of a configuration and load its weights.

    It is built on the meta device, so that its memory is bounded by that of the weight files; the sizes in an
    untrusted configuration are not.
    """
    import diffusers  # takes seconds to import
    from safetensors.torch import load

    try:
        state: dict[str, Tensor] = {}
        for content in files.weights:
            tensors = load(content)
            if twice := state.keys() & tensors.keys():
                raise ValueError(f"two files contain {min(twice)}")
            state |= {name: tensor.float() for name, tensor in tensors.items()}
        _check_depth(files.config, len(state))
        with torch.device("meta"):
            model = getattr(diffusers, files.kind).from_config(files.config)
        model._fix_state_dict_keys_on_load(state)  # names of attention weights from before diffusers 0.17
        model.load_state_dict(state, strict=True, assign=True)
        if unfilled := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
            raise ValueError(f"{unfilled[0]} is not among the weights")
        VAES[files.kind].check(model)
    except Exception as error:  # an untrusted configuration makes the constructor fail in many ways
        first = str(error).strip().splitlines()[:2]
        raise DataError(
            f"cannot build a VAE from the configuration and weights in {folder}: {' '.join(first)}"
        ) from None
    return model


def _check_depth(config: dict[str, Any], tensors: int) -> None:
    """Raise ValueError if a configuration has more layers than the files have tensors.

    Even on the meta device, each layer costs memory and time.
    """
    for key, value in config.items():
        values = value if isinstance(value, list) else [value]
        counts = [v for v in values if isinstance(v, int)] if "layers" in key or "blocks" in key else []
        if max([len(values), *counts]) > max(tensors, 16):
            raise ValueError(f"{key} describes a larger model than the {tensors} tensors of its weights")


def _normalization(folder: Location, known: Vae, model: Any, channels: int) -> Normalization:
    """Validated normalization of a model's latents."""
    try:
        shift, scale = (tuple(map(float, values)) for values in known.normalization(model))
        fits = len(shift) in (1, channels) and len(scale) in (1, channels)
        if fits and all(map(math.isfinite, shift + scale)) and min(scale) > 0:
            return Normalization(shift, scale)
    except (TypeError, ValueError, ArithmeticError, AttributeError):
        pass
    raise DataError(
        f"{folder / CONFIG} has an impossible normalization: correct scaling_factor and shift_factor, "
        "or latents_mean and latents_std"
    )
