"""Inception-v3 of 2015 as TensorFlow ran it: the network of FID, sFID, IS, KID, precision and recall.

Its forward differs from torchvision's: average pools leave the padding out of the mean, the last module takes a maximum
pool where the others average, images are resized as TensorFlow 1 did, and there are 1,008 logits, of which the
inception score uses those without bias. Weights are in no package; a user gives the file.

Shapes: B images, C channels, H height, W width.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdm_scale.errors import DataError
from rdm_scale.evaluation.networks.feature_network import FeatureNetwork, Features, NetworkIdentity
from rdm_scale.evaluation.networks.resizing import TF1_BILINEAR, frames_first, tf1_bilinear
from rdm_scale.evaluation.networks.weight_file import torch_tensors, user_file

KNOWN_SHA256 = "6726825d"  # beginning of the sha256 of the file that pytorch-fid and torch-fidelity publish
KNOWN_NAME = "inception-2015-12-05"
SIZE, LOGITS = 299, 1008
SPATIAL_CHANNELS, SPATIAL_SIZE = 7, 17
_BN_EPSILON = 1e-3
_UNUSED = ("num_batches_tracked", "AuxLogits")

Pool = Callable[[Tensor], Tensor]
_average: Pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_maximum: Pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_reduce: Pool = partial(F.max_pool2d, kernel_size=3, stride=2)


class InceptionPass(NamedTuple):
    """Pooled features [B, 2048] and the first seven channels of `mixed_6/conv` as [B, 17 * 17 * 7]."""

    pooled: Tensor
    spatial: Tensor


class TFInception(nn.Module):
    """Images [B, 3, 299, 299] in [-1, 1) to features; parameter names are those of the published state dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3)
        self.Mixed_5b = _MixedA(192, 32)
        self.Mixed_5c = _MixedA(256, 64)
        self.Mixed_5d = _MixedA(288, 64)
        self.Mixed_6a = _MixedB(288)
        self.Mixed_6b = _MixedC(768, 128)
        self.Mixed_6c = _MixedC(768, 160)
        self.Mixed_6d = _MixedC(768, 160)
        self.Mixed_6e = _MixedC(768, 192)
        self.Mixed_7a = _MixedD(768)
        self.Mixed_7b = _MixedE(1280, _average)
        self.Mixed_7c = _MixedE(2048, _maximum)
        self.fc = nn.Linear(2048, LOGITS)

    def forward(self, x: Tensor) -> InceptionPass:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_reduce(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_reduce(x))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        # mixed_6 of the graph is Mixed_6d here, and mixed_6/conv its convolution of 1 x 1. ADM flattens [H, W, C].
        spatial = self.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
        return InceptionPass(self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3)), spatial)

    def logits_without_bias(self, pooled: Tensor) -> Tensor:
        """The 1,008 logits of the inception score, which leaves the bias out."""
        return pooled @ self.fc.weight.T


class _Convolution(nn.Module):
    """Convolution, batch normalization and ReLU."""

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=_BN_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.bn(self.conv(x)))


def _apply(x: Tensor, *convolutions: nn.Module) -> Tensor:
    for convolution in convolutions:
        x = convolution(x)
    return x


class _MixedA(nn.Module):
    """Module at 35 x 35."""

    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Convolution(channels, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = _Convolution(channels, 48, 1), _Convolution(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Convolution(channels, 64, 1), _Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Convolution(96, 96, 3, padding=1)
        self.branch_pool = _Convolution(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = _apply(x, self.branch5x5_1, self.branch5x5_2)
        three = _apply(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average(x))], 1)


class _MixedB(nn.Module):
    """Reduction from 35 x 35 to 17 x 17."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = _Convolution(channels, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Convolution(channels, 64, 1), _Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Convolution(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = _apply(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        return torch.cat([self.branch3x3(x), double, _reduce(x)], 1)


class _MixedC(nn.Module):
    """Module at 17 x 17, with convolutions of 1 x 7 and 7 x 1."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        wide, high = ((1, 7), (0, 3)), ((7, 1), (3, 0))
        self.branch1x1 = _Convolution(channels, 192, 1)
        self.branch7x7_1 = _Convolution(channels, inner, 1)
        self.branch7x7_2 = _Convolution(inner, inner, wide[0], padding=wide[1])
        self.branch7x7_3 = _Convolution(inner, 192, high[0], padding=high[1])
        self.branch7x7dbl_1 = _Convolution(channels, inner, 1)
        self.branch7x7dbl_2 = _Convolution(inner, inner, high[0], padding=high[1])
        self.branch7x7dbl_3 = _Convolution(inner, inner, wide[0], padding=wide[1])
        self.branch7x7dbl_4 = _Convolution(inner, inner, high[0], padding=high[1])
        self.branch7x7dbl_5 = _Convolution(inner, 192, wide[0], padding=wide[1])
        self.branch_pool = _Convolution(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = _apply(x, self.branch7x7_1, self.branch7x7_2, self.branch7x7_3)
        double = _apply(x, self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3)
        double = _apply(double, self.branch7x7dbl_4, self.branch7x7dbl_5)
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average(x))], 1)


class _MixedD(nn.Module):
    """Reduction from 17 x 17 to 8 x 8."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = _Convolution(channels, 192, 1), _Convolution(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Convolution(channels, 192, 1)
        self.branch7x7x3_2 = _Convolution(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = _Convolution(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = _Convolution(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = _apply(x, self.branch3x3_1, self.branch3x3_2)
        seven = _apply(x, self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3, self.branch7x7x3_4)
        return torch.cat([three, seven, _reduce(x)], 1)


class _MixedE(nn.Module):
    """Module at 8 x 8, whose branches of 3 x 3 are split into 1 x 3 and 3 x 1 side by side."""

    def __init__(self, channels: int, pool: Pool) -> None:
        super().__init__()
        wide, high = ((1, 3), (0, 1)), ((3, 1), (1, 0))
        self.pool = pool
        self.branch1x1 = _Convolution(channels, 320, 1)
        self.branch3x3_1 = _Convolution(channels, 384, 1)
        self.branch3x3_2a = _Convolution(384, 384, wide[0], padding=wide[1])
        self.branch3x3_2b = _Convolution(384, 384, high[0], padding=high[1])
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Convolution(channels, 448, 1), _Convolution(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Convolution(384, 384, wide[0], padding=wide[1])
        self.branch3x3dbl_3b = _Convolution(384, 384, high[0], padding=high[1])
        self.branch_pool = _Convolution(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = _apply(x, self.branch3x3dbl_1, self.branch3x3dbl_2)
        parts = [self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(self.pool(x))]
        return torch.cat(parts, 1)


class InceptionFeatures(FeatureNetwork):
    """The 2,048 pooled features, 2,023 spatial ones and 1,008 logits of images.

    Args:
        weights: file on any fsspec file system: a state dict of pytorch-fid or torch-fidelity, or a TorchScript archive
            with the same names, of which only the tensors are read.

    Raises:
        DataError: the file cannot be read, would run code, or holds other tensors.
    """

    width = 2048
    spatial_width = SPATIAL_CHANNELS * SPATIAL_SIZE**2
    classes = LOGITS

    def __init__(self, weights: str, device: torch.device | str = "cpu") -> None:
        content = user_file(weights)
        digest = hashlib.sha256(content).hexdigest()
        name = KNOWN_NAME if digest.startswith(KNOWN_SHA256) else f"inception-{digest[:8]}"
        self.identity = NetworkIdentity(name, digest, TF1_BILINEAR.format(SIZE))
        self.device = torch.device(device)
        self.network = TFInception()
        self._load(torch_tensors(content, weights), weights)
        self.network.eval().requires_grad_(False).to(self.device)

    def _load(self, tensors: dict[str, Tensor], source: str) -> None:
        wanted = {name for name in self.network.state_dict() if not name.endswith(_UNUSED[0])}
        found = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in _UNUSED)}
        missing, unknown = sorted(wanted - found.keys()), sorted(found.keys() - wanted)
        if missing or unknown:
            raise DataError(
                f"{source} does not hold the tensors of the Inception of FID: {_some(missing)} missing, "
                f"{_some(unknown)} unknown; give pt_inception-2015-12-05-6726825d.pth, or "
                "weights-inception-2015-12-05-6726825d.pth of torch-fidelity"
            )
        try:
            self.network.load_state_dict(found, strict=False)
        except RuntimeError as error:
            raise DataError(f"{source} holds tensors of other shapes: {error}") from None

    def _features(self, pixels_BTHWC: Tensor) -> Features:
        images = (tf1_bilinear(frames_first(pixels_BTHWC), SIZE) - 128) / 128
        pooled, spatial = self.network(images)
        return Features(pooled, spatial, self.network.logits_without_bias(pooled))


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} ({names[0]}, ...)" if names else "none"
