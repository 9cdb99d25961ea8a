"""Resizing against direct computations of single pixels."""

import numpy as np
import torch
from PIL import Image

from rdm_scale.evaluation.networks.resizing import bicubic_uint8, tf1_bilinear


def test_bilinear_samples_where_tensorflow_1_does() -> None:
    """Pixel i of 5 samples 3 pixels at 0.6 i, with no half-pixel shift, and repeats the last pixel."""
    row = torch.tensor([0.0, 10.0, 40.0])
    expected = torch.tensor([0.0, 6.0, 16.0, 34.0, 40.0])
    images = row.expand(1, 2, 3, 3)
    torch.testing.assert_close(tf1_bilinear(images, 5), expected.expand(1, 2, 5, 5))
    torch.testing.assert_close(tf1_bilinear(images.mT, 5), expected[:, None].expand(1, 2, 5, 5))
    assert tf1_bilinear(images, 3) is not None and torch.equal(tf1_bilinear(images, 3), images)


def test_bilinear_reduction_has_no_antialiasing() -> None:
    image = torch.arange(8.0).expand(1, 1, 8, 8)
    assert tf1_bilinear(image, 4)[0, 0, 0].tolist() == [0, 2, 4, 6]


def test_bicubic_is_that_of_image_libraries() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((20, 20), Image.Resampling.BICUBIC)).astype(int)
    found = bicubic_uint8(torch.from_numpy(pixels).permute(2, 0, 1)[None].float(), 20)
    assert found.shape == (1, 3, 20, 20)
    assert (found[0].permute(1, 2, 0).numpy() - expected).__abs__().max() <= 1  # PIL rounds after each axis
