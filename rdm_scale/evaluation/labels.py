"""Label accuracy of generated images and clips, by a nearest-neighbor classifier of real ones."""

import numpy as np
import torch.nn.functional as F
from torch import Tensor

MAX_SIZE = 8  # pixels a side, and frames, after pooling: coarse enough to ignore shifts by a pixel


def label_accuracy(real: Tensor, real_labels: Tensor, generated: Tensor, labels: Tensor, neighbours: int = 5) -> float:
    """Share of generated images to which a k-nearest-neighbor classifier of real images assigns the requested label.

    The distance is Euclidean between images average-pooled to at most 8 x 8 pixels (clips: and 8 frames), which suits
    small, centered images such as digits, but not photographs.

    Args:
        real: [N, C, H, W] real images, or clips [N, C, T, H, W].
        real_labels: int64 [N].
        generated: [M, C, H, W] images, or clips [M, C, T, H, W], on the same scale.
        labels: int64 [M], the requested classes.
        neighbours: number of real images that vote.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ValueError: shapes that do not fit each other, or fewer real images than neighbours.
    """
    if real.shape[1:] != generated.shape[1:] or real.dim() not in (4, 5):
        raise ValueError(f"real images {list(real.shape)} and generated {list(generated.shape)} are not of one size")
    for name, images, given in (("real", real, real_labels), ("generated", generated, labels)):
        if given.shape != (len(images),) or not len(images):
            raise ValueError(f"{len(images)} {name} images need one label each, got labels {list(given.shape)}")
    if not 1 <= neighbours <= len(real):
        raise ValueError(f"neighbours={neighbours} must lie between 1 and the {len(real)} real images")
    from sklearn.neighbors import KNeighborsClassifier

    classifier = KNeighborsClassifier(neighbours).fit(_features(real), real_labels.cpu().numpy())
    return float((classifier.predict(_features(generated)) == labels.cpu().numpy()).mean())


def _features(images: Tensor) -> np.ndarray:
    """Pooled pixels of images [N, C, H, W] or clips [N, C, T, H, W], flattened to [N, features]."""
    clips = images if images.dim() == 5 else images.unsqueeze(2)
    frames, height, width = (min(size, MAX_SIZE) for size in clips.shape[2:])
    return F.adaptive_avg_pool3d(clips.float(), (frames, height, width)).flatten(1).cpu().numpy()
