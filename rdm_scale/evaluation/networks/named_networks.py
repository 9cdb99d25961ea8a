"""Feature networks by the names that options and reference files use."""

import torch

from rdm_scale.errors import ConfigError
from rdm_scale.evaluation.networks.feature_network import FeatureNetwork

IDENTITY = "identity"
NAMES = (
    "i3d (clips), efficientnet-lite0, digits, identity (features given as arrays), inception=FILE, dinov2=FOLDER or "
    "clip=FOLDER"
)


def default_network(frames: int) -> str:
    """Network for samples of which nobody has chosen one: I3D for clips, EfficientNet-Lite0 for images."""
    return "i3d" if frames > 1 else "efficientnet-lite0"


def load_network(name: str, frames: int, device: torch.device | str = "cpu") -> FeatureNetwork:
    """Load a feature network for samples of `frames` frames.

    Raises:
        ConfigError: there is no such network, its package is not installed, or it does not take such samples.
        DataError: its weights are damaged or not the published ones.
    """
    kind, _, place = name.partition("=")
    network: FeatureNetwork
    if name == "i3d":
        from rdm_scale.evaluation.networks.i3d import I3DFeatures

        network = I3DFeatures(device)
    elif name == "efficientnet-lite0":
        from rdm_scale.evaluation.networks.efficientnet_lite0 import EfficientNetLite0Features

        network = EfficientNetLite0Features(device)
    elif name == "digits":
        from rdm_scale.evaluation.networks.digit_classifier import DigitFeatures

        network = DigitFeatures(device, clips=frames > 1)
    elif kind == "inception" and place:
        from rdm_scale.evaluation.networks.tf_inception import InceptionFeatures

        network = InceptionFeatures(place, device)
    elif kind == "dinov2" and place:
        from rdm_scale.evaluation.networks.vision_folders import Dinov2Features

        network = Dinov2Features(place, device)
    elif kind == "clip" and place:
        from rdm_scale.evaluation.networks.vision_folders import ClipFeatures

        network = ClipFeatures(place, device)
    else:
        raise ConfigError(f"there are no features {name!r}: choose {NAMES}")
    network.check(frames)
    return network
