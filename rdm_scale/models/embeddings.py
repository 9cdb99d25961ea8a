"""Patches, positions, timesteps and classes: what turns a noised latent and its condition into tokens."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIMESTEP_FREQUENCIES = 256  # cosines and sines, as in DiT


def patchify(x: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """Latents [B, C, T, H, W] to tokens [S, B, C*t*h*w], S in the order (T, H, W)."""
    B, C, T, H, W = x.shape
    t, h, w = patch_size
    x = x.reshape(B, C, T // t, t, H // h, h, W // w, w)
    return x.permute(2, 4, 6, 0, 1, 3, 5, 7).reshape(-1, B, C * t * h * w)


def unpatchify(tokens: Tensor, patch_size: tuple[int, int, int], size: Sequence[int]) -> Tensor:
    """Tokens [S, B, t*h*w*C] back to [B, C, T, H, W] with size = (T, H, W).

    The channel comes last within a token here and first in `patchify`, as in DiT, whose weights then load as they are.
    """
    B, (t, h, w), (T, H, W) = tokens.shape[1], patch_size, size
    x = tokens.reshape(T // t, H // h, W // w, B, t, h, w, -1)
    return x.permute(3, 7, 0, 4, 1, 5, 2, 6).reshape(B, -1, T, H, W)


def _sincos_1d(width: int, positions: Tensor) -> Tensor:
    """[N] positions to [N, width]: sines then cosines of geometrically spaced frequencies (Vaswani et al. 2017)."""
    frequencies = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = positions.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def spatial_positions(width: int, rows: int, columns: int) -> Tensor:
    """Fixed table [rows*columns, width]: the first half encodes the column, the second the row (as in MAE and DiT)."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([_sincos_1d(width // 2, column.reshape(-1)), _sincos_1d(width // 2, row.reshape(-1))], dim=1)


def temporal_positions(width: int, frames: int) -> Tensor:
    """Fixed table [frames, width]."""
    return _sincos_1d(width, torch.arange(frames))


class TimestepEmbedding(nn.Module):
    """Timesteps [B] to [B, D]: 256 sinusoids through a two-layer MLP (DiT)."""

    def __init__(self, width: int, spacing: Literal["dit", "diffusers"]) -> None:
        super().__init__()
        self.spacing = spacing
        self.hidden = nn.Linear(TIMESTEP_FREQUENCIES, width)
        self.out = nn.Linear(width, width)

    def forward(self, timesteps: Tensor) -> Tensor:
        half = TIMESTEP_FREQUENCIES // 2
        last = half if self.spacing == "dit" else half - 1
        # In the order of operations of both sources: t is up to 1000, and angles carry every rounding 1000 times.
        exponents = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / last
        angles = timesteps.float()[:, None] * exponents.exp()
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.out(F.silu(self.hidden(sinusoids.to(self.hidden.weight.dtype))))
