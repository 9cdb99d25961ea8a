"""Label accuracy on scikit-learn's real digit scans."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from rdm_scale.evaluation import label_accuracy


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """1,797 scans, shuffled, as [N, 3, 32, 32] in [-1, 1], and their labels."""
    scans, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(scans), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(scans).float().view(-1, 1, 8, 8)[order] / 8 - 1
    return F.interpolate(images, size=32, mode="bilinear").repeat(1, 3, 1, 1), torch.from_numpy(labels)[order]


def test_held_out_real_digits_are_recognized(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    accuracy = label_accuracy(images[:1400], labels[:1400], images[1400:], labels[1400:])
    assert 0.97 < accuracy <= 1
    # With requested labels in random order, one image in ten agrees by chance.
    shuffled = labels[1400:][torch.randperm(397, generator=torch.Generator().manual_seed(1))]
    assert label_accuracy(images[:1400], labels[:1400], images[1400:], shuffled) == pytest.approx(0.1, abs=0.06)


def test_accuracy_is_the_share_of_correct_generated_images(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    wrong = torch.cat([labels[:30], (labels[30:40] + 1) % 10])
    assert label_accuracy(images, labels, images[:40], wrong, neighbours=1) == 0.75


def test_large_images_are_pooled_to_8_by_8_before_comparison() -> None:
    """Fine stripes average out in pooling, so the faint coarse pattern decides against them."""
    stripes = torch.ones(2, 16, 16)
    stripes[0, :, ::2] = stripes[1, :, 1::2] = -1
    coarse = torch.zeros(2, 16, 16)
    coarse[0, :8] = 0.1
    real, generated = ((coarse + fine)[:, None].expand(-1, 3, -1, -1) for fine in (stripes, stripes.flip(0)))
    assert label_accuracy(real, torch.tensor([0, 1]), generated, torch.tensor([0, 1]), neighbours=1) == 1


def test_clips_are_compared_by_their_motion() -> None:
    """A bar moves left or right: only the order of the frames distinguishes the classes."""
    right = torch.stack([torch.eye(16)[i].expand(16, 16) for i in range(16)])  # [T, H, W]
    real = torch.stack([right, right.flip(0)])[:, None].expand(-1, 3, -1, -1, -1)
    generated = real.roll(1, dims=-1)
    labels = torch.tensor([0, 1])
    assert label_accuracy(real, labels, generated, labels, neighbours=1) == 1
    assert label_accuracy(real, labels, generated.flip(2), labels, neighbours=1) == 0


def test_mismatched_shapes_and_labels_are_refused(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits[0][:20], digits[1][:20]
    with pytest.raises(ValueError, match="not of one size"):
        label_accuracy(images, labels, images[..., :16], labels)
    with pytest.raises(ValueError, match="20 generated images need one label each"):
        label_accuracy(images, labels, images, labels[:3])
    with pytest.raises(ValueError, match="0 generated images"):
        label_accuracy(images, labels, images[:0], labels[:0])
    with pytest.raises(ValueError, match="neighbours=21 must lie between 1 and the 20"):
        label_accuracy(images, labels, images, labels, neighbours=21)


def test_importing_evaluation_loads_neither_plots_nor_classifiers() -> None:
    code = "import sys, rdm_scale.evaluation; print({'sklearn', 'matplotlib', 'diffusers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
