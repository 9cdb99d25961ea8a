"""A small classifier of handwritten digits, packaged: features for the images and clips of the quickstarts.

It was trained on scikit-learn's scans, moved, scaled and blurred, by `experiments/digit_classifier.py`. Its features
separate digits and their shapes; of photographs they say nothing.
"""

import hashlib
from itertools import pairwise
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdm_scale.errors import DataError
from rdm_scale.evaluation.networks.feature_network import FeatureNetwork, Features, NetworkIdentity
from rdm_scale.evaluation.networks.resizing import BICUBIC, bicubic_uint8, frames_first

WEIGHTS = Path(__file__).with_name("digit_classifier.safetensors")
SHA256 = "8b56bf0f5c92a773d7f72472f4a2875cac025bd701efcf546b311829bc6d4574"
SIZE, WIDTH = 32, 48


class DigitClassifier(nn.Module):
    """Gray images [B, 1, 32, 32] in [0, 1] to features [B, 48]; `classifier` maps these to logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        channels = (1, 16, 32, WIDTH)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in pairwise(channels)
        )
        self.features = nn.Linear(WIDTH * 16, WIDTH)
        self.classes = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        for convolution in self.convolutions:
            x = F.max_pool2d(F.relu(convolution(x)), 2)
        return F.relu(self.features(x.flatten(1)))

    def classifier(self, features: Tensor) -> Tensor:
        return self.classes(features)


class DigitFeatures(FeatureNetwork):
    """Features of images of digits: 48 numbers; for clips also their mean change between frames, 96 numbers."""

    takes_clips = True
    classes = 10

    def __init__(self, device: torch.device | str = "cpu", *, clips: bool = False) -> None:
        self.clips, self.width = clips, WIDTH * (2 if clips else 1)
        self.identity = NetworkIdentity("digit-clips" if clips else "digits", SHA256, f"gray, {BICUBIC.format(SIZE)}")
        self.device = torch.device(device)
        content = WEIGHTS.read_bytes()
        if hashlib.sha256(content).hexdigest() != SHA256:
            raise DataError(f"the packaged weights {WEIGHTS} are damaged: install rdm_scale again")
        self.network = DigitClassifier()
        self.network.load_state_dict(safetensors.torch.load(content))
        self.network.eval().requires_grad_(False).to(self.device)

    def check(self, frames: int) -> None:
        super().check(frames)
        if self.clips != (frames > 1):
            wanted, found = ("clips", "single images") if self.clips else ("single images", f"clips of {frames} frames")
            raise DataError(
                f"the features {self.identity.name} are those of {wanted}, and these samples are {found}: compare sets "
                "of one kind, or choose other --features"
            )

    def _features(self, pixels_BTHWC: Tensor) -> Features:
        B, T = pixels_BTHWC.shape[:2]
        gray = frames_first(pixels_BTHWC).mean(1, keepdim=True)
        by_frame = self.network(bicubic_uint8(gray, SIZE) / 255).view(B, T, WIDTH)
        mean = by_frame.mean(1)
        change = by_frame.diff(dim=1).abs().mean(1) if self.clips else mean[:, :0]
        return Features(torch.cat([mean, change], dim=1), logits=self.network.classifier(mean))
