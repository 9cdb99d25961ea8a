"""The distance of samples from real ones, and its floor."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from rdm_scale.evaluation.measures import frechet_distance
from rdm_scale.evaluation.networks import load_network
from rdm_scale.evaluation.real_comparison import distance_with_floor
from rdm_scale.evaluation.sample_sets import to_float, to_uint8


def scans(count: int) -> torch.Tensor:
    """Digits as uint8 [N, 1, 8, 8, 3]."""
    images = load_digits(return_X_y=True)[0][:count].reshape(-1, 1, 8, 8, 1) / 16
    return torch.from_numpy(np.rint(images * 255).astype(np.uint8).repeat(3, axis=4))


def test_real_samples_are_near_the_floor_and_noise_is_far() -> None:
    real = scans(600)
    found = distance_with_floor(real[:400], real[400:], "digits")
    floor = found.fields["floor"]
    assert found.name == "FD(digits)" and found.fields["floor_samples"] == 200
    assert 0 < floor < 50 and found.value < 3 * floor
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (200, 1, 8, 8, 3), dtype=np.uint8))
    assert distance_with_floor(real[:400], noise, "digits").value > 20 * floor


def test_the_distance_is_that_of_all_features() -> None:
    real = scans(100)
    features = load_network("digits", 1).extract(real).pooled.double().numpy()
    first, second = features[:70], features[70:]
    from rdm_scale.evaluation.feature_moments import Gaussian

    gaussians = (Gaussian(x.mean(0), np.cov(x, rowvar=False)) for x in (first, second))
    found = distance_with_floor(real[:70], real[70:], "digits")
    assert found.value == pytest.approx(frechet_distance(*gaussians), rel=1e-4)
    assert found.fields["floor_samples"] == 30


def test_clips_have_a_video_distance() -> None:
    clips = scans(64).view(8, 8, 8, 8, 3)  # 8 clips of 8 frames
    found = distance_with_floor(clips[:5], clips[5:], "digits")
    assert found.name == "FVD(digit-clips)" and found.fields["frames"] == 8 and found.fields["floor_samples"] == 2
    assert found.value > 0


def test_pixels_survive_the_way_through_floats() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16, 1).expand(-1, -1, -1, -1, 3)
    assert torch.equal(to_uint8(to_float(pixels)), pixels)
