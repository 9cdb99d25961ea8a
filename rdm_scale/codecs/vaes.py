"""The supported VAEs of diffusers: calls, compression and normalization of each.

One `Vae` record per class. Normalizations are those of the diffusers (0.42) pipelines that use the VAE, all in the form
(raw - shift) * scale.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rdm_scale.codecs.codec import Geometry

IDENTITY_GEOMETRY = Geometry(channels=3)


class Normalization(NamedTuple):
    """Affine map (raw - shift) * scale from raw latents to unit scale: one number for all channels, or one for each."""

    shift: Sequence[float]
    scale: Sequence[float]


@dataclass(frozen=True)
class Vae:
    """Calls and properties of the models of one diffusers class.

    Attributes:
        geometry: compression of a model.
        normalization: normalization of a model's latents.
        encode, decode: functions of a model and what `LatentCodec` passes to its own `encode` and `decode`.
        has_posterior: False if latents have no variance.
        pixel_channels: `in_channels` and `out_channels` in the configuration of a model of RGB pixels.
    """

    geometry: Callable[[Any], Geometry]
    normalization: Callable[[Any], Normalization]
    encode: Callable[[Any, Tensor], Tensor]
    decode: Callable[[Any, Tensor], Tensor]
    has_posterior: bool = True
    pixel_channels: Callable[[Any], int] = lambda model: 3

    def check(self, model: Any) -> None:
        """Raise ValueError unless the model encodes RGB pixels and its geometry is possible."""
        config, expected = model.config, self.pixel_channels(model)
        found = {key: getattr(config, key, expected) for key in ("in_channels", "out_channels")}
        if set(found.values()) != {expected}:
            raise ValueError(f"it does not encode RGB pixels: {found}")
        geometry = self.geometry(model)
        if min(geometry.channels, geometry.spatial, geometry.temporal, geometry.frame_step) < 1:
            raise ValueError(f"impossible geometry {geometry}")


# Calls -----------------------------------------------------------------------------------------------------------


def _fold(clips: Tensor) -> Tensor:
    """Clips [B, C, T, H, W] as a batch of images [B T, C, H, W], for VAEs of images."""
    return clips.transpose(1, 2).flatten(0, 1)


def _unfold(images: Tensor, batch: int) -> Tensor:
    return images.unflatten(0, (batch, -1)).transpose(1, 2)


def _moments(vae: Any, pixels: Tensor) -> Tensor:
    posterior = vae.encode(pixels).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], dim=1)


def _frame_moments(vae: Any, pixels: Tensor) -> Tensor:
    return _unfold(_moments(vae, _fold(pixels)), len(pixels))


def _frame_latents(vae: Any, pixels: Tensor) -> Tensor:
    return _unfold(vae.encode(_fold(pixels), return_dict=False)[0], len(pixels))


def _decode(vae: Any, raw: Tensor) -> Tensor:
    pixels: Tensor = vae.decode(raw, return_dict=False)[0]
    return pixels


def _decode_frames(vae: Any, raw: Tensor) -> Tensor:
    return _unfold(_decode(vae, _fold(raw)), len(raw))


def _decode_ltx(vae: Any, raw: Tensor) -> Tensor:
    """Decode with LTXPipeline's default timestep 0 and seeded noise, which later versions of the decoder take."""
    timestep = raw.new_zeros(len(raw)) if vae.config.timestep_conditioning else None
    with torch.random.fork_rng(devices=[raw.device] if raw.is_cuda else []):
        torch.manual_seed(0)
        pixels: Tensor = vae.decode(raw, timestep, return_dict=False)[0]
    return pixels


# Normalizations --------------------------------------------------------------------------------------------------


def _scaled(vae: Any) -> Normalization:
    return Normalization((0.0,), (vae.config.scaling_factor,))


def _shifted(vae: Any) -> Normalization:
    """(raw - shift_factor) * scaling_factor, as in Stable Diffusion 3, and FluxPipeline with AutoencoderTiny."""
    return Normalization((vae.config.shift_factor or 0.0,), (vae.config.scaling_factor,))


def _shifted_or_standardized(vae: Any) -> Normalization:
    """(raw - latents_mean) * scaling_factor / latents_std, as Stable Diffusion XL; `_shifted` without statistics."""
    mean, std = vae.config.latents_mean, vae.config.latents_std
    if mean is None or std is None:
        return _shifted(vae)
    return Normalization(mean, [vae.config.scaling_factor / value for value in std])


def _standardized(vae: Any) -> Normalization:
    """(raw - latents_mean) / latents_std, as WanPipeline, which has no scaling factor."""
    return Normalization(vae.config.latents_mean, [1 / value for value in vae.config.latents_std])


def _standardized_by_buffers(vae: Any) -> Normalization:
    """(raw - mean) * scaling_factor / std, as LTXPipeline, with the statistics in the weights."""
    scale = [vae.config.scaling_factor / value for value in vae.latents_std.tolist()]
    return Normalization(vae.latents_mean.tolist(), scale)


# Geometries ------------------------------------------------------------------------------------------------------


def _halved(blocks: str) -> Callable[[Any], Geometry]:
    """Geometry of an image VAE: all entries but one of the configuration's list `blocks` halve height and width."""
    return lambda vae: Geometry(vae.config.latent_channels, spatial=2 ** (len(vae.config[blocks]) - 1))


def _cogvideox(vae: Any) -> Geometry:
    config = vae.config
    temporal = int(config.temporal_compression_ratio)
    # Latent frames are decoded in pairs, starting with a triple if their number is odd. Only then is the first latent
    # frame decoded to a single frame, as it was encoded, so their number must be odd.
    step = 2 * temporal if temporal > 1 else 1
    return Geometry(config.latent_channels, 2 ** (len(config.block_out_channels) - 1), temporal, step)


def _wan(vae: Any) -> Geometry:
    config = vae.config
    spatial = 2 ** (len(config.dim_mult) - 1) * (config.patch_size or 1)
    # The encoder takes one frame and then four at a time, whatever the compression.
    return Geometry(config.z_dim, spatial, temporal=2 ** sum(map(bool, config.temperal_downsample)), frame_step=4)


def _stated(vae: Any) -> Geometry:
    temporal = int(vae.temporal_compression_ratio)
    return Geometry(vae.config.latent_channels, int(vae.spatial_compression_ratio), temporal, temporal)


VAES: dict[str, Vae] = {
    "AutoencoderKL": Vae(
        _halved("block_out_channels"), _shifted_or_standardized, encode=_frame_moments, decode=_decode_frames
    ),
    # Its latent_magnitude and latent_shift are for storing latents as bytes; no pipeline applies them.
    "AutoencoderTiny": Vae(
        _halved("encoder_block_out_channels"),
        _shifted,
        encode=_frame_latents,
        decode=_decode_frames,
        has_posterior=False,
    ),
    "AutoencoderDC": Vae(
        _halved("encoder_block_out_channels"),
        _scaled,
        encode=_frame_latents,
        decode=_decode_frames,
        has_posterior=False,
    ),
    # invert_scale_latents is about the conditioning image of CogVideoXImageToVideoPipeline only; latents of clips
    # are scaled by scaling_factor in all its pipelines, which ignore shift_factor and the statistics.
    "AutoencoderKLCogVideoX": Vae(_cogvideox, _scaled, encode=_moments, decode=_decode),
    "AutoencoderKLWan": Vae(
        _wan,
        _standardized,
        encode=_moments,
        decode=_decode,
        pixel_channels=lambda vae: 3 * (vae.config.patch_size or 1) ** 2,
    ),
    "AutoencoderKLLTXVideo": Vae(_stated, _standardized_by_buffers, encode=_moments, decode=_decode_ltx),
    "AutoencoderKLHunyuanVideo": Vae(_stated, _scaled, encode=_moments, decode=_decode),
}
