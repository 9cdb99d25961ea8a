"""Training objectives: the distribution of timesteps, the path from data to noise, and the loss."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from rdm_scale.batch import ModelInputs, TrainingBatch
from rdm_scale.config import DiffusionConfig
from rdm_scale.diffusion.noise_schedule import NoiseSchedule
from rdm_scale.errors import ConfigError


class Objective(ABC):
    """Training objective: a path x_t from data x_0 to noise, and the loss of a model that predicts along it.

    Shapes: x0, noise, x_t [B, C, T, H, W]; t, timesteps and loss [B]; all float32. t is one number a sample, drawn
    from the sample's own generator, so that it depends on the sample and not on its batch.
    """

    @abstractmethod
    def draw_timestep(self, generator: torch.Generator) -> float:
        """Draw t of one sample."""

    @abstractmethod
    def model_timesteps(self, t: Tensor) -> Tensor:
        """Timesteps that the model embeds for t, in the range 0 to about 1000."""

    @abstractmethod
    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, the latents on the path at t."""

    @abstractmethod
    def loss(self, prediction: Tensor, x0: Tensor, noise: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
        """Loss of each sample, a mean over its elements; float32 for any dtype of the prediction."""

    def model_inputs(self, batch: TrainingBatch) -> ModelInputs:
        """Noised latents, timesteps and condition of a training batch."""
        x_t = self.noised(batch.latents, batch.noise, batch.t)
        return ModelInputs(x_t, self.model_timesteps(batch.t), batch.condition)

    def sample_losses(self, prediction: Tensor, batch: TrainingBatch) -> Tensor:
        """Loss [B] of each sample of a training batch."""
        x_t = self.noised(batch.latents, batch.noise, batch.t)
        return self.loss(prediction, batch.latents, batch.noise, batch.t, x_t)


class FlowObjective(Objective):
    """Rectified flow: x_t = (1 - t) x_0 + t noise, t in [0, 1]; the model predicts the velocity noise - x_0.

    The loss is the squared error of the velocity.
    Sources: Liu et al. 2022 (arXiv 2209.03003), eq. 1; logit-normal t: Esser et al. 2024 (arXiv 2403.03206), eq. 19.
    """

    def __init__(self, config: DiffusionConfig, learned_variance: bool = False) -> None:
        self.config = config

    def draw_timestep(self, generator: torch.Generator) -> float:
        if self.config.timestep_sampling == "uniform":
            return torch.rand((), generator=generator).item()
        logit = self.config.logit_mean + self.config.logit_std * torch.randn((), generator=generator)
        return torch.sigmoid(logit).item()

    def model_timesteps(self, t: Tensor) -> Tensor:
        return 1000 * t

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        t = t.view(-1, 1, 1, 1, 1)
        return (1 - t) * x0 + t * noise

    def loss(self, prediction: Tensor, x0: Tensor, noise: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
        return _squared_error(prediction, noise - x0)


class DdpmObjective(Objective):
    """DDPM: t is a step index 0 .. num_timesteps - 1 (as float); the model predicts the noise.

    The loss is the squared error of the noise, L_simple. With learned variance the prediction has 2C channels, noise
    and variance, and the loss is L_hybrid = L_simple + L_vlb, where L_vlb is in bits per dimension and has weight 1,
    as in DiT (Peebles & Xie 2023, arXiv 2212.09748).
    Sources: Ho et al. 2020 (arXiv 2006.11239), eq. 14; Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 15 and 16.
    """

    def __init__(self, config: DiffusionConfig, learned_variance: bool) -> None:
        self.schedule = NoiseSchedule.from_config(config)
        self.learned_variance = learned_variance

    def draw_timestep(self, generator: torch.Generator) -> float:
        return float(torch.randint(len(self.schedule.timesteps), (), generator=generator).item())

    def model_timesteps(self, t: Tensor) -> Tensor:
        return t

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self.schedule.noised(x0, noise, t.long())

    def loss(self, prediction: Tensor, x0: Tensor, noise: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
        if not self.learned_variance:
            return _squared_error(prediction, noise)
        predicted_noise, fraction = prediction.chunk(2, dim=1)
        # L_vlb trains only the variance: as a loss of the mean it is far noisier than the squared error.
        bound = self._bits_per_dimension(predicted_noise.detach().float(), fraction.float(), x0, t.long(), x_t)
        return _squared_error(predicted_noise, noise) + bound

    def _bits_per_dimension(self, noise: Tensor, fraction: Tensor, x0: Tensor, k: Tensor, x_t: Tensor) -> Tensor:
        """Term L_{k-1} of the variational bound, L_0 for k = 0, in bits per dimension (Ho et al. 2020, eq. 5)."""
        chain = self.schedule
        mean = chain.posterior_mean(chain.predicted_x0(x_t, noise, k), x_t, k)
        log_variance = chain.learned_log_variance(fraction, k)
        divergence = normal_kl(chain.posterior_mean(x0, x_t, k), chain.posterior_log_variance(k), mean, log_variance)
        nats = torch.where((k == 0).view(-1, 1, 1, 1, 1), discretized_normal_nll(x0, mean, log_variance), divergence)
        return nats.flatten(1).mean(1) / math.log(2)


OBJECTIVES: dict[str, Callable[[DiffusionConfig, bool], Objective]] = {  # called with learned_variance
    "ddpm": DdpmObjective,
    "flow": FlowObjective,
}


def build_objective(config: DiffusionConfig, learned_variance: bool) -> Objective:
    """The objective of a configuration.

    Raises:
        ConfigError: learned variance with an objective other than ddpm, or a schedule whose betas reach 1.
    """
    if learned_variance and config.objective != "ddpm":
        raise ConfigError("model.learned_variance=true needs diffusion.objective=ddpm")
    return OBJECTIVES[config.objective](config, learned_variance)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL divergence of N(mean1, exp(log_variance1)) from N(mean2, exp(log_variance2)), in nats and elementwise."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (ratio.exp() + (mean1 - mean2) ** 2 * (-log_variance2).exp() - 1 - ratio)


def discretized_normal_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log P(bin of x) in nats, elementwise, under a normal distribution discretized to 256 levels in [-1, 1].

    The bin of x extends 1/255 to either side; the first and the last bin extend to infinity.
    Source: Ho et al. 2020 (arXiv 2006.11239), eq. 13.
    """
    scale = (-0.5 * log_variance).exp()
    # Not torch.where, which would copy the infinity to the GPU.
    upper = ((x - mean + 1 / 255) * scale).masked_fill(x > 0.999, torch.inf)
    lower = ((x - mean - 1 / 255) * scale).masked_fill(x < -0.999, -torch.inf)
    # Bins above the mean are mirrored to below it, where erfc is accurate (torch.special.ndtr, made of erf, is not).
    above = lower > 0
    lower, upper = torch.where(above, -upper, lower), torch.where(above, -lower, upper)
    probability = 0.5 * (torch.erfc(-upper / math.sqrt(2)) - torch.erfc(-lower / math.sqrt(2)))
    return -probability.clamp(min=1e-12).log()


def _squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    return ((prediction.float() - target) ** 2).flatten(1).mean(1)
