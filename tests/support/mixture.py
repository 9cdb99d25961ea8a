"""Gaussian mixture whose diffusion is known in closed form; every number of a sample is independent of the others."""

import torch
from torch import Tensor

from rdm_scale import rng
from rdm_scale.config import DiffusionConfig
from rdm_scale.diffusion import sample
from rdm_scale.diffusion.noise_schedule import NoiseSchedule
from rdm_scale.diffusion.samplers import Model

FLOW, DDPM = DiffusionConfig(objective="flow"), DiffusionConfig(objective="ddpm")
SHAPE = (4, 4, 1, 64, 64)  # 65,536 numbers, each a sample of its own
WEIGHTS, MEANS, DEVIATIONS = (0.3, 0.5, 0.2), (-1.5, 0.4, 1.6), (0.25, 0.4, 0.15)


def cdf(x: Tensor) -> Tensor:
    """Distribution function of the data."""
    parts = zip(WEIGHTS, MEANS, DEVIATIONS, strict=True)
    return sum((w * torch.special.ndtr((x.double() - m) / s) for w, m, s in parts), torch.zeros(()))


def posterior_means(x: Tensor, scale: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """E[x0 | x] and E[eps | x] where x = scale x0 + noise eps: by Bayes' rule over the components."""
    parts = list(zip(WEIGHTS, MEANS, DEVIATIONS, strict=True))
    variances = [scale**2 * s**2 + noise**2 for _, _, s in parts]
    log_weights = torch.stack(
        [
            torch.log(torch.tensor(w)) - 0.5 * v.log() - 0.5 * (x - scale * m) ** 2 / v
            for (w, m, _), v in zip(parts, variances, strict=True)
        ]
    )
    share = log_weights.softmax(0)
    excess = [(x - scale * m) / v for (_, m, _), v in zip(parts, variances, strict=True)]
    x0 = sum(p * (m + scale * s**2 * e) for p, (_, m, s), e in zip(share, parts, excess, strict=True))
    eps = sum(p * noise * e for p, e in zip(share, excess, strict=True))
    return x0, eps


def ideal(diffusion: DiffusionConfig) -> Model:
    """Model with the optimal prediction of velocity or noise."""
    alphas_bar = NoiseSchedule.from_config(diffusion).alphas_bar if diffusion.objective == "ddpm" else torch.zeros(0)

    def predict(x: Tensor, timesteps: Tensor, condition: Tensor | None) -> Tensor:
        if diffusion.objective == "flow":
            t = (timesteps / 1000).double().view(-1, 1, 1, 1, 1)
            x0, eps = posterior_means(x.double(), 1 - t, t)
            return eps - x0
        a = alphas_bar[timesteps.long()].double().view(-1, 1, 1, 1, 1)
        return posterior_means(x.double(), a.sqrt(), (1 - a).sqrt())[1]

    return predict


def quantile(p: Tensor) -> Tensor:
    """The inverse of `cdf`."""
    grid = torch.linspace(-5, 5, 200_001, dtype=torch.float64)
    levels = cdf(grid)
    right = torch.searchsorted(levels, p.double()).clamp(1, len(grid) - 1)
    share = (p - levels[right - 1]) / (levels[right] - levels[right - 1]).clamp(min=1e-300)
    return grid[right - 1] + share.clamp(0, 1) * (grid[right] - grid[right - 1])


def flow_map(noise: Tensor) -> Tensor:
    """End of the probability flow that starts at noise: in one dimension the flow keeps quantiles."""
    return quantile(torch.special.ndtr(noise.double()))


def wasserstein(samples: Tensor) -> float:
    """Mean distance of the sorted samples from the data's quantiles (the Wasserstein-1 distance of the marginals)."""
    x = samples.double().flatten().sort().values
    levels = (torch.arange(len(x), dtype=torch.float64) + 0.5) / len(x)
    return (x - quantile(levels)).abs().mean().item()


def draw(diffusion: DiffusionConfig, sampler: str, steps: int) -> Tensor:
    """Samples of the ideal model, drawn with seed 0."""
    return sample(ideal(diffusion), SHAPE, None, steps, 1.0, seed=0, diffusion=diffusion, sampler=sampler)


def path_error(diffusion: DiffusionConfig, sampler: str, steps: int) -> float:
    """Mean distance of each drawn number from the end of its probability-flow path."""
    drawn = [torch.randn(SHAPE[1:], generator=rng.generator(0, "sample", i, 0)) for i in range(SHAPE[0])]
    return (draw(diffusion, sampler, steps) - flow_map(torch.stack(drawn))).abs().mean().item()
