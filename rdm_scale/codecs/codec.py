"""The one interface of all codecs: clips (an image is a clip of one frame) to raw moments, latents to clips."""

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
    """`normalize` in place: memory for the result would cost far more than the arithmetic."""
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
    """How many pixels become how many latents."""

    channels: int  # C
    spatial: int = 1  # pixels along each side of the square that one latent stands for
    temporal: int = 1  # frames that one latent frame stands for, except the first one, which has a latent of its own
    frame_step: int = 1  # a clip has 1 + k * frame_step frames; some VAEs demand more than `temporal` here

    def frames(self, latent_frames: int) -> int:
        """T of a clip whose latents have T' frames."""
        return 1 + (latent_frames - 1) * self.temporal


class LatentCodec:
    """Pixels float [B, 3, T, H, W] in [-1, 1] to latents [B, C, T', H', W'] and back; an image has T = 1.

    A codec of images takes the frames of a clip one by one (as Latte does), so that T' = T.
    Results are on the device of the codec. One codec is for one thread at a time: some video VAEs keep state in a call.

    Attributes:
        record: what a manifest keeps of it.
        has_posterior: whether latents have a variance. Without one only the mode is worth keeping.
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
        """
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
        """(C, T', H', W') of the latents of a clip, or of an image when `frames` is 1.

        Raises DataError: the codec cannot take clips of this length or size.
        """
        factor, step = self.geometry.spatial, self.geometry.frame_step
        if height < 1 or width < 1 or height % factor or width % factor:
            raise DataError(
                f"pictures of {height} x {width} pixels do not fit the codec {self.record.location}: "
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
        """Moments of the posterior of clips [B, 3, T, H, W], raw, float32 [B, 2C, T', H', W'].

        The first C channels are the mean (also the mode), the others the log-variance; a codec without a posterior has
        the smallest log-variance there is.

        Raises:
            DataError: pixels of another shape, or clips that do not fit the codec.
        """
        if pixels.ndim != 5 or pixels.shape[1] != 3:
            raise DataError(f"a codec takes pixels [B, 3, T, H, W], not {list(pixels.shape)}")
        expected = self.latent_shape(*pixels.shape[2:])
        moments = self._encode(pixels.to(self.device, torch.float32)).float()
        if not self.has_posterior:
            moments = torch.cat([moments, torch.full_like(moments, MIN_LOG_VARIANCE)], dim=1)
        self._check(moments.shape[1:], (2 * self.channels, *expected[1:]), "latents")
        return moments

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalized latents [B, C, T', H', W'], as a model samples them, to pixels float32 [B, 3, T, H, W] in [-1, 1].

        Raises:
            DataError: latents of another shape than `encode` makes.
        """
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            raise DataError(
                f"the codec {self.record.location} takes latents [B, {self.channels}, T, H, W], "
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
        """A configuration may be one of a model that the call does not fit; better said here than stored in shards."""
        if tuple(found) != expected:
            raise DataError(
                f"the codec {self.record.location} makes {what} of shape {list(found)} where {list(expected)} is "
                f"expected of {self.record.name}: its configuration is of a variant that is not supported"
            )
