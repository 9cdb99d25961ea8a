"""Feature networks with their real weights."""

import importlib.util

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_sample_image
from torch import Tensor

from rdm_scale.errors import ConfigError
from rdm_scale.evaluation.networks import FeatureNetwork, efficientnet_lite0, i3d, load_network

PALACE = 698  # a class of ImageNet


def packaged(name: str, frames: int = 1) -> FeatureNetwork:
    """A network, or a skipped test where the package with its weights is not installed."""
    if importlib.util.find_spec({"i3d": i3d, "efficientnet-lite0": efficientnet_lite0}[name].PACKAGE) is None:
        pytest.skip(f"the weights of {name}, of the group evaluation, are not installed")
    return load_network(name, frames)


def test_efficientnet_recognizes_a_photograph() -> None:
    """scikit-learn's photograph of a Chinese temple."""
    network = packaged("efficientnet-lite0")
    photograph = load_sample_image("china.jpg")[:, 106:533]
    found = network.extract(torch.from_numpy(photograph.copy())[None, None])
    assert found.pooled.shape == (1, 1280) and found.logits is not None and found.logits.shape == (1, 1000)
    assert int(found.logits.argmax()) == PALACE
    with pytest.raises(ConfigError, match="a network of images, and these are clips of 4 frames"):
        network.extract(torch.zeros(1, 4, 8, 8, 3, dtype=torch.uint8))


def digit_pixels(count: int) -> tuple[Tensor, Tensor]:
    """Scans as uint8 [N, 1, 8, 8, 3], and their labels."""
    scans, labels = load_digits(return_X_y=True)
    pixels = np.rint(scans[:count].reshape(-1, 1, 8, 8, 1) * (255 / 16)).astype(np.uint8).repeat(3, axis=4)
    return torch.from_numpy(pixels), torch.from_numpy(labels[:count])


def test_the_packaged_classifier_recognizes_digits() -> None:
    pixels, labels = digit_pixels(500)
    found = load_network("digits", 1).extract(pixels)
    assert found.logits is not None and found.pooled.shape == (500, 48)
    assert (found.logits.argmax(1) == labels).double().mean() > 0.97


def test_features_of_digit_clips_tell_motion_from_rest() -> None:
    pixels = digit_pixels(2)[0]
    still = pixels[:1].expand(-1, 4, -1, -1, -1)
    moving = torch.cat([pixels[:1], pixels[1:2], pixels[:1], pixels[1:2]], dim=1)
    network = load_network("digits", 4)
    assert network.identity.name == "digit-clips" and network.width == 96
    assert not network.extract(still).pooled[:, 48:].any()
    assert network.extract(moving).pooled[:, 48:].max() > 0.1
    of_image = load_network("digits", 1).extract(pixels[:1]).pooled
    torch.testing.assert_close(network.extract(still).pooled[:, :48], of_image)


def test_networks_refuse_what_they_do_not_take() -> None:
    with pytest.raises(ConfigError, match="there are no features 'vgg': choose i3d"):
        load_network("vgg", 1)
    with pytest.raises(ConfigError, match="takes clips of at least 9 frames, not 8"):
        packaged("i3d", 8)
    with pytest.raises(ConfigError, match="takes clips of at least 9 frames, not 1"):
        packaged("i3d", 1)
