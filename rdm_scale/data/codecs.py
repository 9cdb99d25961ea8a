"""Codecs: what turns images into latents and back.

`identity` leaves pixels as they are, `digits` is the small VAE of this package, and any other name is a folder (local
or any fsspec URL) with a diffusers AutoencoderKL: `config.json` and `diffusion_pytorch_model.safetensors`.
Weights are safetensors only: pickled ones could run code.
"""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rdm_scale.data.manifest import Codec
from rdm_scale.data.storage import Location
from rdm_scale.errors import DataError

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
DIGITS_FOLDER = Path(__file__).parent / "digits_vae"
_MAX_CONFIG_BYTES = 2**20
_MIN_LOG_VARIANCE = -30.0  # diffusers' DiagonalGaussianDistribution clamps here; exp of it is nothing


def normalise(raw: Tensor, record: Codec) -> Tensor:
    """Raw latents [B, C, T, H, W] to unit scale: (raw - shift) * scale."""
    shift, scale = (_per_channel(v, raw) for v in (record.shift, record.scale))
    return (raw - shift) * scale


def denormalise(latents: Tensor, record: Codec) -> Tensor:
    """The inverse of `normalise`."""
    shift, scale = (_per_channel(v, latents) for v in (record.shift, record.scale))
    return latents / scale + shift


def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1, 1)


class ImageCodec(ABC):
    """Images float [B, 3, H, W] in [-1, 1] to latents [B, C, 1, H / factor, W / factor] and back.

    Results are on the device of the codec. `record` is what a manifest keeps of it.
    """

    def __init__(self, record: Codec, channels: int, factor: int, device: torch.device) -> None:
        self.record = record
        self.channels = channels  # C
        self.factor = factor  # pixels along each side of the square that one latent stands for
        self.device = device

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, 1, H, W) of the latents of height x width images. Raises DataError: a size does not divide."""
        if height < 1 or width < 1 or height % self.factor or width % self.factor:
            raise DataError(
                f"images of {height} x {width} pixels do not fit the codec {self.record.location}: "
                f"height and width must be multiples of {self.factor}"
            )
        return self.channels, 1, height // self.factor, width // self.factor

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Moments of the posterior, raw, float32 [B, 2C, 1, H, W]: the mean (also the mode), then the log-variance."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise DataError(f"a codec takes images [B, 3, H, W], not {list(images.shape)}")
        self.latent_shape(images.shape[2], images.shape[3])
        return self._encode(images.to(self.device, torch.float32)).unsqueeze(2)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, 1, H, W], as a model samples them, to images float32 clamped to [-1, 1]."""
        if latents.ndim != 5 or latents.shape[1:3] != (self.channels, 1):
            raise DataError(
                f"the codec {self.record.location} takes latents [B, {self.channels}, 1, H, W], "
                f"not {list(latents.shape)}"
            )
        raw = denormalise(latents.to(self.device, torch.float32), self.record)
        return self._decode(raw.squeeze(2)).clamp(-1, 1)

    @abstractmethod
    def _encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to raw moments [B, 2C, H, W]."""

    @abstractmethod
    def _decode(self, raw: Tensor) -> Tensor:
        """Raw latents [B, C, H, W] to images [B, 3, H, W]."""


class IdentityCodec(ImageCodec):
    """Pixels are the latents; the posterior has no variance."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(Codec(name="identity", location="identity"), channels=3, factor=1, device=device)

    def _encode(self, images: Tensor) -> Tensor:
        return torch.cat([images, torch.full_like(images, _MIN_LOG_VARIANCE)], dim=1)

    def _decode(self, raw: Tensor) -> Tensor:
        return raw


class AutoencoderKLCodec(ImageCodec):
    """A diffusers AutoencoderKL (the VAE of latent diffusion, Rombach et al. 2022)."""

    def __init__(self, vae: Any, record: Codec, device: torch.device) -> None:
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        super().__init__(record, vae.config.latent_channels, factor, device)
        self._vae = vae.to(device).eval().requires_grad_(False)

    def _encode(self, images: Tensor) -> Tensor:
        posterior = self._vae.encode(images).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    def _decode(self, raw: Tensor) -> Tensor:
        images: Tensor = self._vae.decode(raw).sample
        return images


def load_codec(name: str, device: str | torch.device = "cpu") -> ImageCodec:
    """The codec called `identity` or `digits`, or the one in the folder (path or URL) `name`.

    Raises:
        DataError: no such folder, not an AutoencoderKL, damaged or pickled weights.
    """
    return _load(name, torch.device(device), expected_digest=None)


def codec_of(record: Codec, device: str | torch.device = "cpu", location: str | None = None) -> ImageCodec:
    """The codec that made the latents of a manifest, from its recorded place or from where it has moved to.

    It keeps the record's normalisation, which the data was made with.

    Raises:
        DataError: as `load_codec`, or the weights there are not those that the data was encoded with.
    """
    codec = _load(location or record.location, torch.device(device), expected_digest=record.digest)
    if (codec.record.name, codec.record.digest) != (record.name, record.digest):
        raise DataError(f"the data was encoded with the codec {record.name}, but {codec.record.location} holds another")
    codec.record = record
    return codec


def _load(name: str, device: torch.device, expected_digest: str | None) -> ImageCodec:
    if name == "identity":
        return IdentityCodec(device)
    folder = Location(DIGITS_FOLDER if name == "digits" else name)
    config, content = _read(folder)
    digest = hashlib.sha256(content).hexdigest()
    if expected_digest is not None and digest != expected_digest:
        raise DataError(
            f"the weights in {folder} are not those that the data was encoded with (sha256 {digest}, the manifest "
            f"says {expected_digest or 'none'}): bring back the old ones or encode the data again"
        )
    vae = _build_vae(folder, config, content)
    shift, scale = _normalisation(folder, vae.config)
    known_as = ("digits", "digits") if name == "digits" else ("AutoencoderKL", str(folder))
    record = Codec(name=known_as[0], location=known_as[1], digest=digest, shift=shift, scale=scale)
    return AutoencoderKLCodec(vae, record, device)


def _read(folder: Location) -> tuple[dict[str, Any], bytes]:
    """config.json and the bytes of the weights."""
    try:
        names = folder.names() if folder.is_dir() else []
        if CONFIG not in names:
            raise DataError(
                f"there is no codec {folder}: give identity, digits, or a folder with a diffusers AutoencoderKL "
                f"({CONFIG} and {WEIGHTS})"
            )
        if WEIGHTS not in names:
            pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
            found = (
                f"only {pickled[0]}, and pickled weights are not loaded because they can run code" if pickled else ""
            )
            raise DataError(
                f"{folder} has no {WEIGHTS}{': ' + found if found else ''}. "
                "Save it with save_pretrained(safe_serialization=True)"
            )
        if (folder / CONFIG).size() > _MAX_CONFIG_BYTES:
            raise DataError(f"{folder / CONFIG} is too large for a model's configuration")
        config, content = json.loads((folder / CONFIG).read()), (folder / WEIGHTS).read()
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read the codec {folder}: {error}") from None
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind != "AutoencoderKL":
        raise DataError(f"{folder} holds a {kind}: the image codecs known are identity, digits and AutoencoderKL")
    return config, content


def _build_vae(folder: Location, config: dict[str, Any], content: bytes) -> Any:
    """The model, whose memory comes from the file of weights alone, however large the configuration says it is."""
    from diffusers import AutoencoderKL  # takes seconds to import
    from safetensors.torch import load

    try:
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(config)
        state = {name: tensor.float() for name, tensor in load(content).items()}
        vae._fix_state_dict_keys_on_load(state)  # names of attention weights from before diffusers 0.17
        vae.load_state_dict(state, strict=True, assign=True)
    except Exception as error:  # an untrusted configuration makes the constructor fail in many ways
        first = str(error).strip().splitlines()[:2]
        raise DataError(f"the configuration and weights in {folder} do not make a model: {' '.join(first)}") from None
    return vae


def _normalisation(folder: Location, config: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(shift, scale) as the pipelines of diffusers apply them.

    (raw - shift_factor) * scaling_factor as for Stable Diffusion 3, or, with statistics by channel,
    (raw - latents_mean) * scaling_factor / latents_std as for Stable Diffusion XL.
    """
    try:
        factor, channels = float(config.scaling_factor), config.latent_channels
        shift: tuple[float, ...] = (float(config.shift_factor or 0.0),)
        scale: tuple[float, ...] = (factor,)
        if config.latents_mean is not None and config.latents_std is not None:
            shift = tuple(float(mean) for mean in config.latents_mean)
            scale = tuple(factor / float(std) for std in config.latents_std)
        fits = len(shift) in (1, channels) and len(scale) in (1, channels)
        if fits and all(map(math.isfinite, shift + scale)) and min(scale) > 0:
            return shift, scale
    except (TypeError, ValueError, ArithmeticError):
        pass
    raise DataError(
        f"{folder / CONFIG} has an impossible normalisation: correct scaling_factor and shift_factor, "
        "or latents_mean and latents_std"
    )
