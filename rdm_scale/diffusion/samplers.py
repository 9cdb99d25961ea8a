"""Samplers: solvers of the reverse process, from noise to data.

Each step is one to three lines in closed form, on the tables that training needs as well. diffusers' schedulers give
the same numbers if they are set to the same steps, which the tests verify: DDPM with spacing linspace, Euler with given
sigmas, Heun with num_train_timesteps = steps. Their defaults differ: the flow schedulers insert sigma = 1/1000 before
0, and DDIMScheduler steps from t to t - T // steps, which is not the next timestep of a shortened chain from T - 1
down to 0 (the spacing of DiT).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count, pairwise

import torch
from torch import Tensor, nn

from rdm_scale import rng
from rdm_scale.conditions import Condition, TextCondition, concatenate_conditions, repeat_caption
from rdm_scale.config import DiffusionConfig
from rdm_scale.config.schema import OBJECTIVE_SAMPLERS
from rdm_scale.diffusion.noise_schedule import NoiseSchedule
from rdm_scale.diffusion.objectives import Objective, build_objective
from rdm_scale.errors import ConfigError

Model = Callable[[Tensor, Tensor, Condition], Tensor]  # (latents, timesteps [B], condition) -> prediction
ConditionalCall = Callable[[Condition, Tensor, float], Tensor]  # (condition, latents, t) -> prediction
Predict = Callable[[Tensor, float], Tensor]  # (latents, t) -> prediction, guided
DrawNoise = Callable[[], Tensor]  # new noise of the latents' shape at every call
Sampler = Callable[[Predict, DrawNoise, int, DiffusionConfig], Iterator[Tensor]]  # yields the latents of each step


@torch.no_grad()
def sample(
    model: Model,
    shape: Sequence[int],
    condition: Condition,
    steps: int,
    guidance: float,
    seed: int,
    *,
    diffusion: DiffusionConfig,
    sampler: str | None = None,
    null_condition: Condition | int = None,
    learned_variance: bool = False,
    first_index: int = 0,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draw samples from a model; the noise of a sample depends on the seed and its index, and not on its batch.

    Args:
        model: called as model(latents [B, C, T, H, W], timesteps [B], condition); the prediction may have any
            floating-point dtype. With guidance it is called on 2B samples, the conditional ones first.
        shape: (B, C, T, H, W) of the samples.
        condition: None, int64 labels [B], or a TextCondition.
        steps: sampling steps, each one call of the model; with heun two calls, except in the last step.
        guidance: scale s of classifier-free guidance, null + s (conditional - null) (Ho & Salimans 2022, arXiv
            2207.12598, eq. 6 with s = 1 + w); 1 skips the null condition. A learned variance is not guided.
        seed: determines the noise, together with the index of the sample.
        diffusion: configuration of the objective that the model was trained on.
        sampler: ddpm or ddim (objective ddpm), euler or heun (flow); None: ddpm or euler.
        null_condition: the null label, null labels [B], or the empty caption as a TextCondition of one caption;
            required if guidance is not 1.
        learned_variance: the model predicts 2C channels, noise and variance (ddpm only).
        first_index: index of the first sample of this batch.
        device: device of the samples; None: the device of the model's parameters, or else the CPU.
        progress: called as progress(steps_done, steps) after every step.

    Returns:
        Samples of `shape`, float32, in the units of the training latents.

    Raises:
        ConfigError: the sampler, the number of steps, a condition or a prediction does not fit the other arguments.
    """
    solver = _choose_sampler(diffusion.objective, sampler)
    objective = build_objective(diffusion, learned_variance)
    _check(shape, condition, steps, guidance, null_condition)
    device = torch.device(device or _device(model))
    call = _checked_call(model, objective, shape[1] * (2 if learned_variance else 1))
    condition = None if condition is None else condition.to(device)
    predict: Predict = partial(call, condition)
    if condition is not None and guidance != 1:
        predict = _guided(
            call, concatenate_conditions(condition, _null_conditions(condition, null_condition)), guidance
        )
    draw_noise = _keyed_noise(shape, seed, first_index, device)

    for done, latents in enumerate(solver(predict, draw_noise, steps, diffusion), start=1):  # noqa: B007
        if progress is not None:
            progress(done, steps)
    return latents


def _ddpm(predict: Predict, draw_noise: DrawNoise, steps: int, diffusion: DiffusionConfig) -> Iterator[Tensor]:
    """Ancestral sampling: x_{k-1} is drawn from q(x_{k-1} | x_k, x_0) with the predicted x_0.

    The variance is that of the posterior ("fixed small"), or the learned one.
    Sources: Ho et al. 2020 (arXiv 2006.11239), algorithm 2; Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 15.
    """
    chain, x = NoiseSchedule.from_config(diffusion).respaced(steps), draw_noise()
    for k, t in _backwards(chain, x.device):
        noise, *fraction = predict(x, t).split(x.shape[1], dim=1)
        mean = chain.posterior_mean(chain.predicted_x0(x, noise, k), x, k)
        log_variance = chain.learned_log_variance(fraction[0], k) if fraction else chain.posterior_log_variance(k)
        x = mean + (0.5 * log_variance).exp() * draw_noise() if k > 0 else mean
        yield x


def _ddim(predict: Predict, draw_noise: DrawNoise, steps: int, diffusion: DiffusionConfig) -> Iterator[Tensor]:
    """DDIM: the deterministic sampler of the same chain (Song et al. 2021, arXiv 2010.02502, eq. 12, sigma = 0)."""
    chain, x = NoiseSchedule.from_config(diffusion).respaced(steps), draw_noise()
    for k, t in _backwards(chain, x.device):
        noise = predict(x, t)[:, : x.shape[1]]
        x = chain.previous(chain.predicted_x0(x, noise, k), noise, k)
        yield x


def _euler(predict: Predict, draw_noise: DrawNoise, steps: int, diffusion: DiffusionConfig) -> Iterator[Tensor]:
    """Euler's method for dx/dt = velocity, from t = 1 to 0 in equal steps (Liu et al. 2022, arXiv 2209.03003)."""
    x = draw_noise()
    for t, t_next in pairwise(_times(steps)):
        x = x + (t_next - t) * predict(x, t)
        yield x


def _heun(predict: Predict, draw_noise: DrawNoise, steps: int, diffusion: DiffusionConfig) -> Iterator[Tensor]:
    """Heun's second-order method for the same equation (Karras et al. 2022, arXiv 2206.00364, algorithm 1).

    The last step is Euler's, which ends at the predicted x_0: at t = 0 the velocity of data on a manifold is undefined,
    and models are hardly trained there. One such step does not reduce the order.
    """
    x = draw_noise()
    for t, t_next in pairwise(_times(steps)):
        velocity = predict(x, t)
        ahead = x + (t_next - t) * velocity
        x = ahead if t_next == 0 else x + (t_next - t) * (velocity + predict(ahead, t_next)) / 2
        yield x


SAMPLERS: dict[str, Sampler] = {"ddpm": _ddpm, "ddim": _ddim, "euler": _euler, "heun": _heun}


def _choose_sampler(objective: str, sampler: str | None) -> Sampler:
    known = OBJECTIVE_SAMPLERS[objective]
    name = sampler or known[0]
    if name not in known:
        raise ConfigError(f"sampler {name!r} does not fit diffusion.objective={objective}: use {' or '.join(known)}")
    return SAMPLERS[name]


def _check(
    shape: Sequence[int], condition: Condition, steps: int, guidance: float, null_condition: Condition | int
) -> None:
    if len(shape) != 5 or min(shape) < 1:
        raise ConfigError(f"shape={list(shape)} of the samples must be [B, C, T, H, W], each at least 1")
    if steps < 1:
        raise ConfigError(f"steps={steps} must be at least 1")
    if not (math.isfinite(guidance) and guidance >= 0):
        raise ConfigError(f"guidance={guidance} must be a finite number, at least 0")
    if isinstance(condition, Tensor) and condition.shape != (shape[0],):
        raise ConfigError(
            f"condition must contain one label for each of the {shape[0]} samples: {list(condition.shape)}"
        )
    if isinstance(condition, TextCondition) and len(condition.pooled) != shape[0]:
        raise ConfigError(
            f"condition must contain a caption for each of {shape[0]} samples, not {len(condition.pooled)}"
        )
    if guidance == 1:
        return
    if condition is None or null_condition is None:
        raise ConfigError(f"guidance={guidance} needs a condition and a null_condition: give both, or guidance=1")
    if isinstance(condition, TextCondition) != isinstance(null_condition, TextCondition):
        raise ConfigError("condition and null_condition must both be captions, or both labels")
    if isinstance(null_condition, Tensor) and null_condition.shape not in ((), (shape[0],)):
        raise ConfigError(f"null_condition must be one label or one per sample, not {list(null_condition.shape)}")


def _backwards(chain: NoiseSchedule, device: torch.device) -> Iterator[tuple[Tensor, float]]:
    """Step k (int64 [1]) and its timestep for the model, from the noisiest step to the first."""
    for k in reversed(range(len(chain.timesteps))):
        yield torch.tensor([k], device=device), float(chain.timesteps[k])


def _times(steps: int) -> list[float]:
    """Times from 1 to 0 in `steps` equal steps."""
    return [1 - i / steps for i in range(steps + 1)]


def _checked_call(model: Model, objective: Objective, channels: int) -> ConditionalCall:
    """The model as a function of one t for the batch, in float32; ConfigError for another number of channels."""

    def call(condition: Condition, x: Tensor, t: float) -> Tensor:
        timesteps = objective.model_timesteps(torch.full((len(x),), t, device=x.device))
        prediction = model(x, timesteps, condition).float()
        if prediction.shape != (len(x), channels, *x.shape[2:]):
            raise ConfigError(
                f"the model returned {list(prediction.shape)} for latents {list(x.shape)}, and {channels} "
                "channels of that size were expected: learned_variance and the shape must be those that the model was "
                "built with"
            )
        return prediction

    return call


def _null_conditions(condition: Tensor | TextCondition, null: Condition | int) -> Tensor | TextCondition:
    """The null condition, repeated for each sample."""
    if isinstance(condition, TextCondition):
        assert isinstance(null, TextCondition)
        return repeat_caption(null.to(condition.pooled.device), len(condition.pooled))
    return torch.as_tensor(null, device=condition.device, dtype=condition.dtype).expand_as(condition)


def _guided(call: ConditionalCall, conditions: Tensor | TextCondition, guidance: float) -> Predict:
    """Classifier-free guidance, with conditional and null predictions in one batch (Ho & Salimans 2022, eq. 6)."""

    def predict(x: Tensor, t: float) -> Tensor:
        conditional, null = call(conditions, torch.cat([x, x]), t).chunk(2)
        C = x.shape[1]
        # Guidance is defined for scores, which the noise is and a learned variance is not.
        guided = null[:, :C] + guidance * (conditional[:, :C] - null[:, :C])
        return torch.cat([guided, conditional[:, C:]], dim=1)

    return predict


def _keyed_noise(shape: Sequence[int], seed: int, first_index: int, device: torch.device) -> DrawNoise:
    """Standard normal noise as a function of (seed, index of the sample, number of the draw), drawn on the CPU."""
    draws = count()

    def draw_noise() -> Tensor:
        draw = next(draws)
        generators = (rng.generator(seed, "sample", first_index + i, draw) for i in range(shape[0]))
        return torch.stack([torch.randn(tuple(shape[1:]), generator=g) for g in generators]).to(device)

    return draw_noise


def _device(model: Model) -> torch.device:
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device
