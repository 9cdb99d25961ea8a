"""Random batches and a plain objective, for benchmarks whose data do not matter."""

import torch
from torch import Tensor

from rdm_scale.batch import ModelInputs, TrainingBatch
from rdm_scale.config import InputConfig


class SquaredError:
    """Objective without noising: predict the batch's noise from its latents."""

    def model_inputs(self, batch: TrainingBatch) -> ModelInputs:
        return ModelInputs(batch.latents, batch.t, batch.condition)

    def sample_losses(self, prediction: Tensor, batch: TrainingBatch) -> Tensor:
        return (prediction - batch.noise).square().flatten(1).mean(1)


def random_batch(size: InputConfig, samples: int, seed: int = 0) -> TrainingBatch:
    """Normal latents and noise, uniform timesteps in [0, 1), labels of 10 classes; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(samples, size.channels, size.frames, size.height, size.width, generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    numbers = torch.arange(samples)
    return TrainingBatch(0, numbers, numbers, latents, noise, torch.rand(samples, generator=generator), numbers % 10)
