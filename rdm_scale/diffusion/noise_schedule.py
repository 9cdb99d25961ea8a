"""Gaussian diffusion in discrete steps: noise schedules, and the posterior of one step.

Sources: Ho et al. 2020 (DDPM, arXiv 2006.11239), Nichol & Dhariwal 2021 (arXiv 2102.09672), Song et al. 2021 (DDIM,
arXiv 2010.02502).

Shapes: B samples, K steps of a chain; x, x0, xk and noise [B, C, T, H, W]; k int64 [B].
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor

from rdm_scale.config import DiffusionConfig
from rdm_scale.errors import ConfigError

MAX_BETA = 0.999  # Nichol & Dhariwal 2021, section 3.2: avoids singularities at the last steps of the cosine schedule


def linear_betas(num_timesteps: int) -> Tensor:
    """Betas [num_timesteps] (float64), linear from 1e-4 to 0.02 for 1000 steps and scaled by 1000 / num_timesteps.

    Source: Ho et al. 2020, section 4.

    Raises:
        ConfigError: the last beta would reach 1.
    """
    scale = 1000 / num_timesteps
    if scale * 0.02 >= 1:
        raise ConfigError(
            f"diffusion.num_timesteps={num_timesteps} is too short for diffusion.noise_schedule=linear, whose last "
            "beta would reach 1: use more than 20 steps, or cosine"
        )
    return torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64)


def cosine_betas(num_timesteps: int) -> Tensor:
    """Betas [num_timesteps = T] (float64) of alpha_bar(t) = cos^2((t / T + s) / (1 + s) * pi / 2), s = 0.008.

    Source: Nichol & Dhariwal 2021, equation 17.
    """
    time = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    alphas_bar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alphas_bar[1:] / alphas_bar[:-1]).clamp(max=MAX_BETA)


# Betas [T] in float64 by the number of timesteps T.
NOISE_SCHEDULES: dict[str, Callable[[int], Tensor]] = {"linear": linear_betas, "cosine": cosine_betas}


class NoiseSchedule:
    """A chain q(x_k | x_{k-1}) of K noising steps, with the posterior q(x_{k-1} | x_k, x_0) of each step.

    Source: Ho et al. 2020, eq. 2 and 4 to 7. All tables are float64 [K], because 1 - alpha_bar of the first steps has
    only three digits in float32; results are float32.

    Attributes:
        timesteps: timestep of each step as the model embeds it; differs from k in a chain shortened by `respaced`.
        alphas_bar: cumulative products of 1 - beta.
    """

    def __init__(self, alphas_bar: Tensor, timesteps: Tensor) -> None:
        previous = torch.cat([torch.ones_like(alphas_bar[:1]), alphas_bar[:-1]])
        betas = 1 - alphas_bar / previous
        variance = betas * (1 - previous) / (1 - alphas_bar)
        # The first variance is 0, since x_0 is known; for its logarithm the next one is used, as in the code of
        # Nichol & Dhariwal 2021.
        variance[0] = variance[1] if len(variance) > 1 else betas[0]
        self.timesteps = timesteps
        self.alphas_bar = alphas_bar
        self.log_betas = betas.log()
        self._tables = _Tables(
            signal=alphas_bar.sqrt(),
            noise=(1 - alphas_bar).sqrt(),
            previous_signal=previous.sqrt(),
            previous_noise=(1 - previous).sqrt(),
            log_beta=self.log_betas,
            posterior_log_variance=variance.log(),
            x0_weight=betas * previous.sqrt() / (1 - alphas_bar),
            xk_weight=(1 - previous) * (1 - betas).sqrt() / (1 - alphas_bar),
        )
        self._copies: dict[torch.device, _Tables] = {}  # float32, on each device that has asked for them

    @classmethod
    def from_config(cls, config: DiffusionConfig) -> Self:
        """The chain that training uses.

        Raises:
            ConfigError: its betas would reach 1.
        """
        betas = NOISE_SCHEDULES[config.noise_schedule](config.num_timesteps)
        return cls((1 - betas).cumprod(0), torch.arange(config.num_timesteps))

    def respaced(self, steps: int) -> Self:
        """The chain over `steps` evenly spaced timesteps with the same marginals q(x_k | x_0).

        The noisiest timestep is always included, because sampling starts from pure noise.
        Source: Nichol & Dhariwal 2021, section 4.

        Raises:
            ConfigError: steps is not between 1 and K.
        """
        longest = len(self.timesteps)
        if not 1 <= steps <= longest:
            raise ConfigError(f"sampling.steps={steps} must lie between 1 and diffusion.num_timesteps={longest}")
        chosen = torch.linspace(longest - 1, 0, steps, dtype=torch.float64).round().long().flip(0)
        return type(self)(self.alphas_bar[chosen], self.timesteps[chosen])

    def noised(self, x0: Tensor, noise: Tensor, k: Tensor) -> Tensor:
        """x_k = sqrt(alpha_bar_k) x_0 + sqrt(1 - alpha_bar_k) noise (Ho et al. 2020, eq. 4)."""
        tables = self._on(k.device)
        return _at(tables.signal, k) * x0 + _at(tables.noise, k) * noise

    def predicted_x0(self, xk: Tensor, noise: Tensor, k: Tensor) -> Tensor:
        """x_0 = (x_k - sqrt(1 - alpha_bar_k) noise) / sqrt(alpha_bar_k) (Ho et al. 2020, eq. 15)."""
        tables = self._on(k.device)
        return (xk - _at(tables.noise, k) * noise) / _at(tables.signal, k)

    def previous(self, x0: Tensor, noise: Tensor, k: Tensor) -> Tensor:
        """x_{k-1} of the same x_0 and noise as x_k: the step of DDIM (Song et al. 2021, eq. 12 with sigma = 0)."""
        tables = self._on(k.device)
        return _at(tables.previous_signal, k) * x0 + _at(tables.previous_noise, k) * noise

    def posterior_mean(self, x0: Tensor, xk: Tensor, k: Tensor) -> Tensor:
        """Mean of q(x_{k-1} | x_k, x_0) (Ho et al. 2020, eq. 7)."""
        tables = self._on(k.device)
        return _at(tables.x0_weight, k) * x0 + _at(tables.xk_weight, k) * xk

    def posterior_log_variance(self, k: Tensor) -> Tensor:
        """Logarithm of the variance of q(x_{k-1} | x_k, x_0), [B, 1, 1, 1, 1] (Ho et al. 2020, eq. 7)."""
        return _at(self._on(k.device).posterior_log_variance, k)

    def learned_log_variance(self, fraction: Tensor, k: Tensor) -> Tensor:
        """Log-variance, interpolated from that of the posterior (fraction -1) to log(beta) (fraction 1).

        Source: Nichol & Dhariwal 2021, eq. 15.
        """
        share = (fraction + 1) / 2
        return share * _at(self._on(k.device).log_beta, k) + (1 - share) * self.posterior_log_variance(k)

    def _on(self, device: torch.device) -> "_Tables":
        """Tables in float32 on `device`, copied there at their first use only."""
        if device not in self._copies:
            with torch.inference_mode(False):
                self._copies[device] = _Tables(*(table.to(device, torch.float32) for table in self._tables))
        return self._copies[device]


class _Tables(NamedTuple):
    """Coefficients [K] of each step k: those of x_0 ("signal") and of the noise in x_k and x_{k-1}, and more."""

    signal: Tensor
    noise: Tensor
    previous_signal: Tensor
    previous_noise: Tensor
    log_beta: Tensor
    posterior_log_variance: Tensor
    x0_weight: Tensor
    xk_weight: Tensor


def _at(table: Tensor, k: Tensor) -> Tensor:
    """table[k], shaped [B, 1, 1, 1, 1]."""
    return table[k].view(-1, 1, 1, 1, 1)
