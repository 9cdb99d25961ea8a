"""The interface of all codecs, and the normalization of latents.

A codec encodes clips to the moments of a posterior, and decodes latents to clips. An image is a clip of one frame.

Shapes: B samples, C channels of latents, T frames, H height, W width; T', H', W' those of latents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from rdm_scale.codecs.record import CodecRecord
from rdm_scale.errors import DataError

# The bounds of latent diffusion (Rombach et al. 2022) and of diffusers' DiagonalGaussianDistribution.
MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -30.0, 20.0


def clamp_log_variance(log_variance: Tensor) -> Tensor:
    """The log-variance of a posterior within the bounds that keep its exponential finite."""
    return log_variance.clamp(MIN_LOG_VARIANCE, MAX_LOG_VARIANCE)


def normalize(raw: Tensor, record: CodecRecord) -> Tensor:
    """Raw latents [B, C, T, H, W] to unit scale: (raw - shift) * scale."""
    return normalize_(raw.clone(), record)


def normalize_(raw: Tensor, record: CodecRecord) -> Tensor:
    """`normalize` in place: allocating the result costs far more than the arithmetic."""
    if any(record.shift):
        raw.sub_(_per_channel(record.shift, raw))
    if any(factor != 1 for factor in record.scale):
        raw.mul_(_per_channel(record.scale, raw))
    return raw


def denormalize(latents: Tensor, record: CodecRecord) -> Tensor:
    """The inverse of `normalize`."""
    shift, scale = (_per_channel(v, latents) for v in (record.shift, record.scale))
    return latents / scale + shift


def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    return _column(values, like.dtype, like.device)


@lru_cache(maxsize=64)
def _column(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1, 1)


@dataclass(frozen=True)
class Geometry:
    """Compression of a codec: the numbers of pixels and frames that one latent covers."""

    channels: int  # C
    spatial: int = 1  # height and width of one latent, in pixels
    temporal: int = 1  # frames per latent frame, except that the first frame has a latent frame to itself
    frame_step: int = 1  # clips have 1 + k * frame_step frames; some VAEs require a multiple of `temporal`

    def frames(self, latent_frames: int) -> int:
        """Number T of frames of a clip whose latents have T' frames."""
        return 1 + (latent_frames - 1) * self.temporal


class LatentCodec:
    """Encoder of pixels, float [B, 3, T, H, W] in [-1, 1], to latents [B, C, T', H', W'], and decoder of latents.

    A codec of images encodes the frames of a clip one by one (as Latte does), so that T' = T. Results are on the device
    of the codec. A codec must not be used by two threads at once: some video VAEs keep state during a call.

    Attributes:
        record: identity and normalization, for a manifest.
        geometry: its compression.
        device: of the weights and the results.
        has_posterior: False if latents have no variance; then only the mode is worth storing.
    """

    def __init__(
        self,
        record: CodecRecord,
        geometry: Geometry,
        encode: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor], Tensor],
        device: torch.device,
        *,
        has_posterior: bool,
    ) -> None:
        """Wrap the functions of a model.

        Args:
            encode: pixels [B, 3, T, H, W] to raw moments [B, 2C, T', H', W'], or, when there is no posterior, to raw
                latents [B, C, T', H', W'].
            decode: raw latents [B, C, T', H', W'] to pixels [B, 3, T, H, W].
        """
        self.record = record
        self.geometry = geometry
        self.device = device
        self.has_posterior = has_posterior
        self._encode, self._decode = encode, decode

    @property
    def channels(self) -> int:
        return self.geometry.channels

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape (C, T', H', W') of the latents of a clip, or of an image when `frames` is 1.

        Raises:
            DataError: the codec does not encode clips of this length or size.
        """
        factor, step = self.geometry.spatial, self.geometry.frame_step
        if height < 1 or width < 1 or height % factor or width % factor:
            raise DataError(
                f"images of {height} x {width} pixels do not fit the codec {self.record.location}: "
                f"height and width must be multiples of {factor}"
            )
        if frames < 1 or (frames - 1) % step:
            below = 1 + max(0, frames - 1) // step * step
            raise DataError(
                f"clips of {frames} frames do not fit the codec {self.record.location}: {self.record.name} compresses "
                f"time and takes 1 + {step} k frames; choose {below} or {below + step}"
            )
        return self.channels, 1 + (frames - 1) // self.geometry.temporal, height // factor, width // factor

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Raw posterior moments, float32 [B, 2C, T', H', W'], of clips [B, 3, T, H, W].

        The first C channels are the mean, which is also the mode, the others the log-variance. A codec without a
        posterior returns the lowest log-variance, `MIN_LOG_VARIANCE`.

        Raises:
            DataError: the pixels have another shape, or the clips do not fit the codec.
        """
        if pixels.ndim != 5 or pixels.shape[1] != 3:
            raise DataError(f"a codec encodes pixels [B, 3, T, H, W], not {list(pixels.shape)}")
        expected = self.latent_shape(*pixels.shape[2:])
        moments = self._encode(pixels.to(self.device, torch.float32)).float()
        if not self.has_posterior:
            moments = torch.cat([moments, torch.full_like(moments, MIN_LOG_VARIANCE)], dim=1)
        self._check(moments.shape[1:], (2 * self.channels, *expected[1:]), "latents")
        return moments

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, float32 [B, 3, T, H, W] in [-1, 1], of normalized latents [B, C, T', H', W'].

        Raises:
            DataError: the latents have another shape than those of `encode`.
        """
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            raise DataError(
                f"the codec {self.record.location} decodes latents [B, {self.channels}, T, H, W], "
                f"not {list(latents.shape)}"
            )
        frames = self.geometry.frames(latents.shape[2])
        height, width = (size * self.geometry.spatial for size in latents.shape[3:])
        self.latent_shape(frames, height, width)
        raw = denormalize(latents.to(self.device, torch.float32), self.record)
        pixels = self._decode(raw).float().clamp(-1, 1)
        self._check(pixels.shape[1:], (3, frames, height, width), "pixels")
        return pixels

    def _check(self, found: tuple[int, ...], expected: tuple[int, ...], what: str) -> None:
        """Raise DataError unless a result has the expected shape, which variants of a model may change."""
        if tuple(found) != expected:
            raise DataError(
                f"the codec {self.record.location} makes {what} of shape {list(found)}, expected {list(expected)} for "
                f"{self.record.name}: its configuration describes an unsupported variant; use another VAE"
            )
