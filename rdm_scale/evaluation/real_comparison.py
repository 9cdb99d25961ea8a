"""Distance of a few samples from a real set, with the distance that as many real samples have: its floor."""

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rdm_scale import rng
from rdm_scale.evaluation.feature_moments import FeatureMoments, Gaussian
from rdm_scale.evaluation.measurements import Measurement, measure
from rdm_scale.evaluation.measures import frechet_distance
from rdm_scale.evaluation.networks.named_networks import load_network
from rdm_scale.evaluation.sample_sets import ArraySamples
from rdm_scale.evaluation.set_statistics import Wanted, measure_set


def distance_with_floor(
    real_NTHWC: Tensor, generated_NTHWC: Tensor, features: str, device: torch.device | str = "cpu", seed: int = 0
) -> Measurement:
    """Frechet distance of uint8 samples from real ones, with the fields `floor` and `floor_samples`.

    The floor is the distance of as many real samples, chosen by key, from the other real ones: no model can be expected
    to fall below it. At most half of the real samples are chosen.

    Args:
        features: a network of `--features`.

    Raises:
        ConfigError: there is no such network, or it does not take these samples.
    """
    frames = real_NTHWC.shape[1]
    network = load_network(features, frames, device)
    sets = (("real", real_NTHWC), ("generated", generated_NTHWC))
    real, generated = (
        measure_set(ArraySamples(pixels.numpy(), name), network, Wanted(len(pixels)), option=features)
        for name, pixels in sets
    )
    (found,) = measure(["fvd" if frames > 1 else "fid"], real, generated)
    assert real.features is not None
    count = min(len(generated_NTHWC), len(real.features) // 2)
    order = torch.randperm(len(real.features), generator=rng.generator(seed, "floor of a distance")).numpy()
    chosen, others = (_gaussian(real.features[part]) for part in (order[:count], order[count:]))
    floor = {"floor": frechet_distance(chosen, others), "floor_samples": count}
    return dataclasses.replace(found, fields=found.fields | floor)


def _gaussian(features: NDArray[np.float32]) -> Gaussian:
    moments = FeatureMoments(features.shape[1])
    moments.add(torch.from_numpy(features))
    return moments.gaussian()
