"""The Gaussian diffusion chain: noise schedules and the posterior of one step."""

import math
from typing import Self

import torch
from torch import Tensor

from rdm_scale.config import DiffusionConfig
from rdm_scale.errors import ConfigError

MAX_BETA = 0.999  # Nichol & Dhariwal 2021, section 3.2: keeps the last cosine steps from being singular


def linear_betas(num_timesteps: int) -> Tensor:
    """Betas [T] (float64) from 1e-4 to 0.02 (Ho et al. 2020, section 4), scaled by 1000 / T for other lengths."""
    scale = 1000 / num_timesteps
    if scale * 0.02 >= 1:
        raise ConfigError(
            f"diffusion.num_timesteps={num_timesteps} is too short for diffusion.noise_schedule=linear, whose last "
            "beta would reach 1: use more than 20 steps, or cosine"
        )
    return torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64)


def cosine_betas(num_timesteps: int) -> Tensor:
    """Betas [T] (float64) of alpha_bar = cos^2((t / T + s) / (1 + s) * pi / 2), s = 0.008.

    Source: Nichol & Dhariwal 2021, equation 17.
    """
    time = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    alphas_bar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alphas_bar[1:] / alphas_bar[:-1]).clamp(max=MAX_BETA)


class NoiseSchedule:
    """A chain q(x_k | x_{k-1}) of K noising steps, and q(x_{k-1} | x_k, x_0) of each (Ho et al. 2020, eq. 4 to 7).

    `timesteps[k]` is what the model calls step k; it differs from k in a chain shortened by `respaced`.
    The tables [K] are float64: 1 - alpha_bar of the first steps has only three digits in float32.
    All methods take x [B, C, T, H, W] and the step k of each sample, int64 [B].
    """

    def __init__(self, alphas_bar: Tensor, timesteps: Tensor) -> None:
        previous = torch.cat([torch.ones_like(alphas_bar[:1]), alphas_bar[:-1]])
        betas = 1 - alphas_bar / previous
        variance = betas * (1 - previous) / (1 - alphas_bar)
        # The first variance is 0, for x_0 is certain given x_0; its logarithm is replaced by its neighbour's
        # (Nichol & Dhariwal 2021, footnote on the lower bound of the learned range).
        variance[0] = variance[1] if len(variance) > 1 else betas[0]
        self.timesteps = timesteps
        self.alphas_bar = alphas_bar
        self.previous_alphas_bar = previous
        self.log_betas = betas.log()
        self.posterior_log_variances = variance.log()
        self.x0_weights = betas * previous.sqrt() / (1 - alphas_bar)
        self.xk_weights = (1 - previous) * (1 - betas).sqrt() / (1 - alphas_bar)

    @classmethod
    def from_config(cls, config: DiffusionConfig) -> Self:
        """The chain of `config`, which training uses. Raises ConfigError where its betas would reach 1."""
        betas = {"linear": linear_betas, "cosine": cosine_betas}[config.noise_schedule](config.num_timesteps)
        return cls((1 - betas).cumprod(0), torch.arange(config.num_timesteps))

    def respaced(self, steps: int) -> Self:
        """The chain over `steps` evenly spaced timesteps with the same marginals (Nichol & Dhariwal 2021, section 4).

        The noisiest timestep is always among them, since sampling starts from pure noise.
        """
        longest = len(self.timesteps)
        if not 1 <= steps <= longest:
            raise ConfigError(f"sampling.steps={steps} must lie between 1 and diffusion.num_timesteps={longest}")
        chosen = torch.linspace(longest - 1, 0, steps, dtype=torch.float64).round().long().flip(0)
        return type(self)(self.alphas_bar[chosen], self.timesteps[chosen])

    def noised(self, x0: Tensor, noise: Tensor, k: Tensor) -> Tensor:
        """x_k = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise."""
        return _at(self.alphas_bar.sqrt(), k) * x0 + _at((1 - self.alphas_bar).sqrt(), k) * noise

    def predicted_x0(self, xk: Tensor, noise: Tensor, k: Tensor) -> Tensor:
        """The inverse of `noised`: x_0 when `noise` is what made x_k."""
        return (xk - _at((1 - self.alphas_bar).sqrt(), k) * noise) / _at(self.alphas_bar.sqrt(), k)

    def previous(self, x0: Tensor, noise: Tensor, k: Tensor) -> Tensor:
        """x_{k-1} made of the same x_0 and noise as x_k: the step of DDIM (Song et al. 2021, eq. 12, sigma = 0)."""
        return _at(self.previous_alphas_bar.sqrt(), k) * x0 + _at((1 - self.previous_alphas_bar).sqrt(), k) * noise

    def posterior_mean(self, x0: Tensor, xk: Tensor, k: Tensor) -> Tensor:
        """Mean of q(x_{k-1} | x_k, x_0)."""
        return _at(self.x0_weights, k) * x0 + _at(self.xk_weights, k) * xk

    def posterior_log_variance(self, k: Tensor) -> Tensor:
        """Logarithm of the variance of q(x_{k-1} | x_k, x_0), [B, 1, 1, 1, 1]."""
        return _at(self.posterior_log_variances, k)

    def learned_log_variance(self, fraction: Tensor, k: Tensor) -> Tensor:
        """log(variance) between the posterior's (fraction -1) and beta (fraction 1): Nichol & Dhariwal 2021, eq. 15."""
        share = (fraction + 1) / 2
        return share * _at(self.log_betas, k) + (1 - share) * self.posterior_log_variance(k)


def _at(table: Tensor, k: Tensor) -> Tensor:
    """table[k] in float32, shaped [B, 1, 1, 1, 1]."""
    return table.to(k.device, torch.float32)[k].view(-1, 1, 1, 1, 1)
