"""Training objectives: what is drawn, what the model sees, what it should say."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from rdm_scale.batch import ModelInputs, TrainingBatch
from rdm_scale.config import DiffusionConfig
from rdm_scale.diffusion.noise_schedule import NoiseSchedule
from rdm_scale.errors import ConfigError


class Objective(ABC):
    """A path from data x_0 to noise, and the loss of a model that is to walk it back.

    Shapes: x0, noise, x_t [B, C, T, H, W]; t, timesteps and loss [B]; all float32. t is one number a sample, drawn
    with a generator of the sample's own, so that the draw is a function of the sample and not of its batch.
    """

    @abstractmethod
    def draw_timestep(self, generator: torch.Generator) -> float:
        """t of one sample."""

    @abstractmethod
    def model_timesteps(self, t: Tensor) -> Tensor:
        """What the model embeds for t, in the range 0 to about 1000."""

    @abstractmethod
    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t."""

    @abstractmethod
    def loss(self, prediction: Tensor, x0: Tensor, noise: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
        """Loss of each sample, a mean over its elements, in float32 whatever the type of the prediction."""

    def model_inputs(self, batch: TrainingBatch) -> ModelInputs:
        """Noised latents, timesteps and condition of a training batch."""
        x_t = self.noised(batch.latents, batch.noise, batch.t)
        return ModelInputs(x_t, self.model_timesteps(batch.t), batch.model_condition)

    def sample_losses(self, prediction: Tensor, batch: TrainingBatch) -> Tensor:
        """Loss [B] of each sample of a training batch."""
        x_t = self.noised(batch.latents, batch.noise, batch.t)
        return self.loss(prediction, batch.latents, batch.noise, batch.t, x_t)


class FlowObjective(Objective):
    """Rectified flow: x_t = (1 - t) x_0 + t noise, t in [0, 1]; the model predicts the velocity noise - x_0.

    Source: Liu et al. 2022 (arXiv 2209.03003), eq. 1; logit-normal t: Esser et al. 2024 (arXiv 2403.03206), eq. 19.
    """

    def __init__(self, config: DiffusionConfig) -> None:
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

    With learned variance the prediction has 2C channels, noise and variance, and the loss is the hybrid one.
    Source: Ho et al. 2020 (arXiv 2006.11239), eq. 14; Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 16, with the
    weight of the bound that DiT uses: 1 on its bits per dimension.
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
        # The bound trains the variance only: through the mean it is far noisier than the squared error.
        bound = self._bits_per_dimension(predicted_noise.detach().float(), fraction.float(), x0, t.long(), x_t)
        return _squared_error(predicted_noise, noise) + bound

    def _bits_per_dimension(self, noise: Tensor, fraction: Tensor, x0: Tensor, k: Tensor, x_t: Tensor) -> Tensor:
        """The term of step k in the variational bound (Ho et al. 2020, eq. 5): L_{k-1}, or L_0 where k = 0."""
        chain = self.schedule
        mean = chain.posterior_mean(chain.predicted_x0(x_t, noise, k), x_t, k)
        log_variance = chain.learned_log_variance(fraction, k)
        divergence = normal_kl(chain.posterior_mean(x0, x_t, k), chain.posterior_log_variance(k), mean, log_variance)
        nats = torch.where((k == 0).view(-1, 1, 1, 1, 1), discretized_normal_nll(x0, mean, log_variance), divergence)
        return nats.flatten(1).mean(1) / math.log(2)


def build_objective(config: DiffusionConfig, learned_variance: bool) -> Objective:
    """The objective that `config` names.

    Raises:
        ConfigError: learned variance with another objective than ddpm, or a schedule whose betas reach 1.
    """
    if config.objective == "ddpm":
        return DdpmObjective(config, learned_variance)
    if learned_variance:
        raise ConfigError("model.learned_variance=true needs diffusion.objective=ddpm")
    return FlowObjective(config)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, variance1) || N(mean2, variance2)) in nats, element by element."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (ratio.exp() + (mean1 - mean2) ** 2 * (-log_variance2).exp() - 1 - ratio)


def discretized_normal_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log P(the bin of x) in nats under a normal whose axis is cut into the 256 levels of [-1, 1].

    Bins reach 1/255 to either side; the first and the last reach to infinity (Ho et al. 2020, eq. 13).
    """
    scale = (-0.5 * log_variance).exp()
    upper = torch.where(x > 0.999, torch.inf, (x - mean + 1 / 255) * scale)
    lower = torch.where(x < -0.999, -torch.inf, (x - mean - 1 / 255) * scale)
    # Above the mean by symmetry from below, where erfc keeps its digits (torch.special.ndtr, made of erf, does not).
    above = lower > 0
    lower, upper = torch.where(above, -upper, lower), torch.where(above, -lower, upper)
    probability = 0.5 * (torch.erfc(-upper / math.sqrt(2)) - torch.erfc(-lower / math.sqrt(2)))
    return -probability.clamp(min=1e-12).log()


def _squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    return ((prediction.float() - target) ** 2).flatten(1).mean(1)
