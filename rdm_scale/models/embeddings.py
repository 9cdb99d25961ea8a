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


def _angles(positions: Tensor, number: int) -> Tensor:
    """[N] positions to [N, number]: times geometrically spaced frequencies (Vaswani et al. 2017), in double."""
    return positions.double()[:, None] * 10000.0 ** -(torch.arange(number, dtype=torch.float64) / number)


def _sincos_1d(width: int, positions: Tensor) -> Tensor:
    """[N] positions to [N, width]: sines then cosines."""
    angles = _angles(positions, width // 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def spatial_positions(width: int, rows: int, columns: int) -> Tensor:
    """Fixed table [rows*columns, width]: the first half encodes the column, the second the row (as in MAE and DiT)."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([_sincos_1d(width // 2, column.reshape(-1)), _sincos_1d(width // 2, row.reshape(-1))], dim=1)


def temporal_positions(width: int, frames: int) -> Tensor:
    """Fixed table [frames, width]."""
    return _sincos_1d(width, torch.arange(frames))


def axial_rotation(head_size: int, grid: tuple[int, int, int], clips: bool) -> Tensor:
    """Cosines and sines [2, S, head_size / 2] by which the pairs of a head's channels turn at each token.

    The pairs are shared out among the axes, each pair turning with its token's place along one of them (axial RoPE,
    arXiv 2403.13298, eq. 12; RoFormer, arXiv 2104.09864): T, H and W for models of clips, a third each, or H and W.
    """
    pairs, axes = head_size // 2, (0, 1, 2) if clips else (1, 2)
    shares = [pairs // len(axes)] * len(axes)
    shares[0] += pairs - sum(shares)
    places = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    angles = torch.cat([_angles(places[axis].reshape(-1), n) for axis, n in zip(axes, shares, strict=True)], dim=1)
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """x [..., d] with each pair of channels (2i, 2i + 1) turned; rotation [2, ..., d / 2]. In the type of x."""
    cos, sin = rotation
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


class PooledEmbedding(nn.Module):
    """The pooled vectors of captions [B, P] to [B, D] through a two-layer MLP (as in Stable Diffusion 3)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, width)
        self.out = nn.Linear(width, width)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.out(F.silu(self.hidden(pooled.to(self.hidden.weight.dtype))))


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
