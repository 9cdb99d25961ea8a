"""The interface of feature networks: uint8 pixels to feature vectors, with the identity that measures carry.

Shapes: B samples, T frames (1 for images), H height, W width, D features, S spatial features, K classes.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rdm_scale.errors import ConfigError


class Features(NamedTuple):
    """Features of a batch, float32 on the CPU.

    Attributes:
        pooled: [B, D].
        spatial: [B, S], for sFID.
        logits: [B, K], for the inception score.
    """

    pooled: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True)
class NetworkIdentity:
    """Identity of a feature network and of its preprocessing: features of different ones cannot be compared.

    Attributes:
        name: for instance efficientnet-lite0.
        digest: sha256 of the weights; empty without weights.
        resize: how pixels are brought to the size that the network takes.
    """

    name: str
    digest: str
    resize: str


class FeatureNetwork(ABC):
    """Network that maps images or clips to features.

    Attributes:
        identity: of weights and preprocessing.
        width: number D of features.
        takes_clips: True for a network of clips, False for one of images.
        min_frames: fewest frames of a clip.
        spatial_width: number S of spatial features; 0 without.
        classes: number K of classes; 0 without.
        device: of the weights.
    """

    identity: NetworkIdentity
    width: int
    takes_clips = False
    min_frames = 1
    spatial_width = 0
    classes = 0
    device = torch.device("cpu")

    def check(self, frames: int) -> None:
        """Raise ConfigError unless the network takes samples of this many frames."""
        if frames > 1 and not self.takes_clips:
            raise ConfigError(
                f"{self.identity.name} is a network of images, and these are clips of {frames} frames: use --features "
                "i3d or digits"
            )
        if self.takes_clips and frames < self.min_frames:
            raise ConfigError(
                f"{self.identity.name} takes clips of at least {self.min_frames} frames, not {frames}: choose longer "
                "clips or another network (--features)"
            )

    @torch.no_grad()
    def extract(self, pixels_BTHWC: Tensor) -> Features:
        """Features of uint8 pixels [B, T, H, W, 3].

        Raises:
            ConfigError: the network does not take samples of this many frames.
        """
        self.check(pixels_BTHWC.shape[1])
        pooled, spatial, logits = self._features(pixels_BTHWC.to(self.device))
        return Features(
            pooled.float().cpu(),
            None if spatial is None else spatial.float().cpu(),
            None if logits is None else logits.float().cpu(),
        )

    @abstractmethod
    def _features(self, pixels_BTHWC: Tensor) -> Features:
        """Features of uint8 pixels on the network's device."""
