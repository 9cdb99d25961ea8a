"""The samplers against diffusers' schedulers, set to the same steps."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from torch import Tensor

from rdm_scale import rng
from rdm_scale.config import DiffusionConfig
from rdm_scale.diffusion import sample
from rdm_scale.diffusion.noise_schedule import NoiseSchedule
from rdm_scale.diffusion.samplers import Model

SHAPE = (1, 2, 1, 4, 4)
DDPM = {"linear": "linear", "cosine": "squaredcos_cap_v2"}  # name of each schedule in diffusers


def model(x: Tensor, timesteps: Tensor, condition: Tensor | None = None) -> Tensor:
    """A smooth function of both arguments that keeps samples of order 1."""
    return 0.9 * x + 0.3 * torch.sin(3 * x + timesteps.view(-1, 1, 1, 1, 1) / 200)


def with_variance(x: Tensor, timesteps: Tensor, condition: Tensor | None = None) -> Tensor:
    return torch.cat([model(x, timesteps), torch.tanh(x)], 1)


def noise(draw: int) -> Tensor:
    return torch.randn(SHAPE[1:], generator=rng.generator(3, "sample", 0, draw))[None]


def sample_with(predict: Model, steps: int, sampler: str, diffusion: DiffusionConfig, **changes: bool) -> Tensor:
    return sample(predict, SHAPE, None, steps, 1.0, 3, diffusion=diffusion, sampler=sampler, **changes)


def assert_samples_close(found: Tensor, expected: Tensor) -> None:
    assert 0.1 < expected.abs().max() < 100
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("schedule", DDPM)
def test_noise_schedules(schedule: str) -> None:
    chain = NoiseSchedule.from_config(DiffusionConfig(objective="ddpm", noise_schedule=schedule))
    scheduler = DDPMScheduler(1000, beta_schedule=DDPM[schedule])
    torch.testing.assert_close(chain.alphas_bar.float(), scheduler.alphas_cumprod, rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("steps", [10, 64, 1000])
@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_ddpm(steps: int, variance_type: str) -> None:
    scheduler = DDPMScheduler(1000, clip_sample=False, timestep_spacing="linspace", variance_type=variance_type)
    scheduler.set_timesteps(steps)
    learned = variance_type == "learned_range"
    predict = with_variance if learned else model
    x = noise(0)
    for i, t in enumerate(scheduler.timesteps, start=1):
        generator = rng.generator(3, "sample", 0, i)
        x = scheduler.step(predict(x, t[None]), t, x, generator=generator).prev_sample
    found = sample_with(predict, steps, "ddpm", DiffusionConfig(objective="ddpm"), learned_variance=learned)
    assert_samples_close(found, x)


@pytest.mark.parametrize("steps", [10, 64, 1000])
def test_ddim(steps: int) -> None:
    """DDIMScheduler steps from t to t - T // steps, which is correct only in a chain of all timesteps.

    It therefore gets the betas of the shortened chain as a chain of its own, and the model the original timesteps.
    """
    chosen = np.linspace(0, 999, steps).round().astype(int)
    alphas_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[chosen]
    betas = 1 - alphas_bar / np.concatenate([[1], alphas_bar[:-1]])
    scheduler = DDIMScheduler(steps, trained_betas=betas.tolist(), clip_sample=False)
    scheduler.set_timesteps(steps)
    x = noise(0)
    for k in scheduler.timesteps:
        x = scheduler.step(model(x, torch.tensor([chosen[k]])), int(k), x).prev_sample
    assert_samples_close(sample_with(model, steps, "ddim", DiffusionConfig(objective="ddpm")), x)


@pytest.mark.parametrize("steps", [1, 10, 33])
def test_euler(steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    x = noise(0)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t[None]), t, x).prev_sample
    assert_samples_close(sample_with(model, steps, "euler", DiffusionConfig()), x)


@pytest.mark.parametrize("steps", [2, 10, 33])
def test_heun(steps: int) -> None:
    """The scheduler's smallest sigma is 1 / num_train_timesteps, which otherwise only scales the timesteps."""
    scheduler = FlowMatchHeunDiscreteScheduler(num_train_timesteps=steps)
    scheduler.set_timesteps(steps)
    x = noise(0)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t[None] * 1000 / steps), t, x).prev_sample
    assert_samples_close(sample_with(model, steps, "heun", DiffusionConfig()), x)
