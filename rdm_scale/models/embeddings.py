"""Embeddings of latents, positions, timesteps and captions, and the inverse of the patch embedding's layout.

Shapes: S tokens, B samples, C channels, P width of a pooled caption, D hidden size, d channels of a head.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdm_scale.config.model import TIMESTEP_FREQUENCIES


def patchify(x: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """Cut latents [B, C, T, H, W] into tokens [S, B, C*t*h*w], S in the order (T, H, W)."""
    B, C, T, H, W = x.shape
    t, h, w = patch_size
    x = x.reshape(B, C, T // t, t, H // h, h, W // w, w)
    return x.permute(2, 4, 6, 0, 1, 3, 5, 7).reshape(-1, B, C * t * h * w)


def unpatchify(tokens: Tensor, patch_size: tuple[int, int, int], size: Sequence[int]) -> Tensor:
    """Assemble tokens [S, B, t*h*w*C] into latents [B, C, T, H, W] with size = (T, H, W).

    The channel comes last within a token here and first in `patchify`, as in DiT, whose weights load
    without reordering.
    """
    B, (t, h, w), (T, H, W) = tokens.shape[1], patch_size, size
    x = tokens.reshape(T // t, H // h, W // w, B, t, h, w, -1)
    return x.permute(3, 7, 0, 4, 1, 5, 2, 6).reshape(B, -1, T, H, W)


@cache  # without a limit: CUDA graphs hold the addresses of tables, so that none may be freed
def table_on(device: torch.device, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Fixed table `function(*arguments)` on `device`: computed on the CPU and copied once, at its first use."""
    with torch.inference_mode(False), torch.device("cpu"):
        return function(*arguments).to(device)


def _angles(positions: Tensor, number: int) -> Tensor:
    """Angles [N, number] of positions [N], in double precision.

    The products of positions with geometrically spaced frequencies (Vaswani et al. 2017).
    """
    return positions.double()[:, None] * 10000.0 ** -(torch.arange(number, dtype=torch.float64) / number)


def _sincos_1d(width: int, positions: Tensor) -> Tensor:
    """Sinusoidal embedding [N, width] of positions [N]: sines, then cosines."""
    angles = _angles(positions, width // 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def spatial_positions(width: int, rows: int, columns: int) -> Tensor:
    """Fixed position table [rows * columns, width], as in MAE and DiT.

    The first half of the width encodes the column, the second the row.
    """
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([_sincos_1d(width // 2, column.reshape(-1)), _sincos_1d(width // 2, row.reshape(-1))], dim=1)


def temporal_positions(width: int, frames: int) -> Tensor:
    """Fixed position table [frames, width]."""
    return _sincos_1d(width, torch.arange(frames))


def axial_rope(head_size: int, grid: tuple[int, int, int], clips: bool) -> Tensor:
    """Axial RoPE: cosines and sines [2, S, d / 2] of the rotation of each channel pair at each token.

    The pairs are divided equally between the axes, T, H and W for models of clips, else H and W; the first axis gets
    the remainder. A pair rotates in proportion to the token's position along its axis (arXiv 2403.13298, eq. 12;
    RoFormer, arXiv 2104.09864).
    """
    pairs, axes = head_size // 2, (0, 1, 2) if clips else (1, 2)
    counts = [pairs // len(axes)] * len(axes)
    counts[0] += pairs - sum(counts)
    positions = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    angles = torch.cat([_angles(positions[axis].reshape(-1), n) for axis, n in zip(axes, counts, strict=True)], dim=1)
    return torch.stack([angles.cos(), angles.sin()]).float()


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate each channel pair (2i, 2i + 1) of x [..., d] by `rope` [2, ..., d / 2], in fp32; returns x's dtype."""
    cos, sin = rope
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def _timestep_frequencies(spacing: Literal["dit", "diffusers"]) -> Tensor:
    """Frequencies [128] of the timestep's sinusoids."""
    half = TIMESTEP_FREQUENCIES // 2
    last = half if spacing == "dit" else half - 1
    # The order of operations of both sources: with t up to 1000 an angle amplifies each rounding error 1000 times.
    return (-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / last).exp()


class PooledEmbedding(nn.Module):
    """Two-layer MLP from pooled caption embeddings [B, P] to [B, D] (as in Stable Diffusion 3)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, width)
        self.out = nn.Linear(width, width)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.out(F.silu(self.hidden(pooled.to(self.hidden.weight.dtype))))


class TimestepEmbedding(nn.Module):
    """Embedding of timesteps [B] in [B, D]: 256 sinusoids, then a two-layer MLP (DiT)."""

    def __init__(self, width: int, spacing: Literal["dit", "diffusers"]) -> None:
        super().__init__()
        self.spacing = spacing
        self.hidden = nn.Linear(TIMESTEP_FREQUENCIES, width)
        self.out = nn.Linear(width, width)

    def forward(self, timesteps: Tensor) -> Tensor:
        angles = timesteps.float()[:, None] * table_on(timesteps.device, _timestep_frequencies, self.spacing)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.out(F.silu(self.hidden(sinusoids.to(self.hidden.weight.dtype))))
