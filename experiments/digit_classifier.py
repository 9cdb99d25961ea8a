"""Train the packaged digit classifier, whose features measure the quickstarts' samples.

Trains on four fifths of scikit-learn's 1,797 scans, moved, scaled and blurred at random, and prints the accuracy on the
others. Writes the weights and their sha256.

    OMP_NUM_THREADS=1 python experiments/digit_classifier.py
"""

import argparse
import hashlib
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from rdm_scale.evaluation.networks.digit_classifier import SIZE, WEIGHTS, DigitClassifier

HELD_OUT = 5  # every fifth scan
LARGEST, SMALLEST = 1.1, 0.4  # size of a digit relative to the image


def digits() -> tuple[Tensor, Tensor]:
    """Scans as float [N, 1, 32, 32] in [0, 1], and their labels."""
    scans, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(scans).float().view(-1, 1, 8, 8) / 16
    return F.interpolate(images, size=SIZE, mode="bicubic").clamp(0, 1), torch.from_numpy(labels)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move and scale each image within the frame, and blur a third of them."""
    size = torch.rand(len(images), 1, generator=generator) * (LARGEST - SMALLEST) + SMALLEST
    room = (1 - size).clamp(min=0) + 0.1
    shift = (torch.rand(len(images), 2, generator=generator) * 2 - 1) * room
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / size[:, 0]
    theta[:, :, 2] = -shift / size
    moved = F.grid_sample(images, F.affine_grid(theta, list(images.shape), align_corners=False), align_corners=False)
    blurred = torch.rand(len(images), 1, 1, 1, generator=generator) < 1 / 3
    return torch.where(blurred, F.avg_pool2d(moved, 3, stride=1, padding=1), moved)


def train(steps: int, batch_size: int) -> tuple[DigitClassifier, float, float]:
    """The trained classifier, its accuracy on held-out scans, and that on held-out scans moved and scaled."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    images, labels = digits()
    held_out = torch.arange(len(images)) % HELD_OUT == 0
    network = DigitClassifier()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    known, known_labels = images[~held_out], labels[~held_out]
    for _ in range(steps):
        chosen = torch.randint(len(known), (batch_size,), generator=generator)
        features = network(augment(known[chosen], generator))
        loss = F.cross_entropy(network.classifier(features), known_labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        accuracies = [
            float((network.classifier(network(x)).argmax(1) == labels[held_out]).float().mean())
            for x in (images[held_out], augment(images[held_out], generator))
        ]
    return network, accuracies[0], accuracies[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2500, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="default: the packaged file")
    options = parser.parse_args()
    network, accuracy, moved = train(options.steps, options.batch_size)
    content = safetensors.torch.save({name: tensor.contiguous() for name, tensor in network.state_dict().items()})
    options.output.write_bytes(content)
    print(f"held-out scans: {100 * accuracy:.1f} % recognized, moved and scaled {100 * moved:.1f} %")
    print(f"{options.output}: {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
