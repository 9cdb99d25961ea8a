"""Resizing as the published networks expect it.

Shapes: B images, C channels, H height, W width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

TF1_BILINEAR = "bilinear as TensorFlow 1 (no half-pixel centers, no antialiasing) to {0}x{0}"
BICUBIC = "bicubic, antialiased, rounded to uint8, to {0}x{0}"


def tf1_bilinear(images_BCHW: Tensor, size: int) -> Tensor:
    """Resize float images to [B, C, size, size] like `tf.image.resize_bilinear` of TensorFlow 1.

    Output pixel i samples the input at i * H / size: corners are not aligned and centers are not shifted by half a
    pixel, unlike in PyTorch. The published Inception and I3D measures were computed with this.
    """
    rows = _blend(images_BCHW, size, dim=2)
    return _blend(rows, size, dim=3)


def _blend(x: Tensor, size: int, dim: int) -> Tensor:
    length = x.shape[dim]
    if length == size:
        return x
    at = torch.arange(size, dtype=torch.float32, device=x.device) * (length / size)
    low = at.long()
    weight = (at - low).to(x.dtype).view([-1 if d == dim else 1 for d in range(x.dim())])
    below, above = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=length - 1))
    return below + (above - below) * weight


def bicubic_uint8(images_BCHW: Tensor, size: int) -> Tensor:
    """Resize float images in 0..255 to [B, C, size, size] and round them, as image files do."""
    if images_BCHW.shape[2:] == (size, size):
        return images_BCHW
    resized = F.interpolate(images_BCHW, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0, 255).round()


def frames_first(pixels_BTHWC: Tensor) -> Tensor:
    """All frames of uint8 clips [B, T, H, W, 3] as float images [B * T, 3, H, W] in 0..255."""
    return pixels_BTHWC.flatten(0, 1).permute(0, 3, 1, 2).float()
