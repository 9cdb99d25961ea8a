"""Samplers against closed forms: for normal data N(M, S^2) the ideal prediction and all marginals are known."""

import math

import pytest
import torch
from torch import Tensor

from rdm_scale import rng
from rdm_scale.conditions import EncodedText, TextCondition
from rdm_scale.config import DiffusionConfig, InputConfig, ModelConfig
from rdm_scale.diffusion import sample
from rdm_scale.diffusion.samplers import Model
from rdm_scale.errors import ConfigError
from rdm_scale.models import build_model

M, S = 0.5, 0.6
SHAPE = (4, 2, 1, 32, 32)
FLOW, DDPM = DiffusionConfig(objective="flow"), DiffusionConfig(objective="ddpm")
ALPHAS_BAR = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
ALL = [(FLOW, "euler"), (FLOW, "heun"), (DDPM, "ddpm"), (DDPM, "ddim")]


def ideal_velocity(x: Tensor, timesteps: Tensor, condition: Tensor | None, s: float = S) -> Tensor:
    """E[noise - x0 | x_t] of data N(M, s^2)."""
    t = (timesteps / 1000).view(-1, 1, 1, 1, 1)
    excess = (x - (1 - t) * M) / ((1 - t) ** 2 * s**2 + t**2)
    return t * excess - (M + (1 - t) * s**2 * excess)


def ideal_noise(x: Tensor, timesteps: Tensor, condition: Tensor | None, s: float = S) -> Tensor:
    """E[noise | x_t] of data N(M, s^2)."""
    a = ALPHAS_BAR[timesteps.long()].float().view(-1, 1, 1, 1, 1)
    return (1 - a).sqrt() * (x - a.sqrt() * M) / (a * s**2 + 1 - a)


def ideal(diffusion: DiffusionConfig, s: float = S) -> Model:
    predict = ideal_velocity if diffusion.objective == "flow" else ideal_noise
    return lambda x, timesteps, condition: predict(x, timesteps, condition, s)


def keyed_noise(seed: int = 0, draw: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.stack(
        [torch.randn(shape[1:], generator=rng.generator(seed, "sample", i, draw)) for i in range(shape[0])]
    )


def draw(diffusion: DiffusionConfig, sampler: str, steps: int, model: Model | None = None, **changes: object) -> Tensor:
    arguments = {"shape": SHAPE, "condition": None, "guidance": 1.0, "seed": 0, **changes}
    return sample(model or ideal(diffusion), steps=steps, diffusion=diffusion, sampler=sampler, **arguments)


@pytest.mark.parametrize(
    ("diffusion", "sampler", "steps"), [(FLOW, "euler", 500), (FLOW, "heun", 40), (DDPM, "ddim", 500)]
)
def test_ode_samplers_map_each_noise_to_its_quantile(diffusion: DiffusionConfig, sampler: str, steps: int) -> None:
    """The probability flow keeps quantiles: noise z ends at M + S z, sample by sample."""
    error = draw(diffusion, sampler, steps) - (M + S * keyed_noise())
    assert error.abs().max() < 0.02


def test_ancestral_sampling_reaches_mean_and_variance() -> None:
    samples = draw(DDPM, "ddpm", 1000)
    assert samples.mean().item() == pytest.approx(M, abs=4 * S / math.sqrt(samples.numel()))
    assert samples.std().item() == pytest.approx(S, rel=0.03)
    correlation = torch.corrcoef(torch.stack([samples.flatten(), keyed_noise().flatten()]))[0, 1]
    assert abs(correlation) < 0.15  # new noise at every step: unlike with ddim, little of the first noise remains


def test_the_right_learned_variance_makes_few_steps_exact() -> None:
    """For normal data q(x_{k-1} | x_k) is normal; with its variance, ancestral sampling has no discretization error."""
    steps = 6
    chosen = torch.linspace(0, 999, steps).round().long()
    bar = ALPHAS_BAR[chosen]
    previous = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    beta = 1 - bar / previous
    posterior = beta * (1 - previous) / (1 - bar)
    posterior[0] = posterior[1]
    x0_variance = S**2 * (1 - bar) / (bar * S**2 + 1 - bar)  # Var(x0 | x_k)
    right = posterior + previous * beta**2 / (1 - bar) ** 2 * x0_variance
    fractions = torch.full((1000,), torch.nan)
    fractions[chosen] = (2 * (right.log() - posterior.log()) / (beta.log() - posterior.log()) - 1).float()

    def model(x: Tensor, timesteps: Tensor, condition: Tensor | None) -> Tensor:
        fraction = fractions[timesteps.long()].view(-1, 1, 1, 1, 1).expand_as(x)
        return torch.cat([ideal_noise(x, timesteps, None), fraction], 1)

    samples = draw(DDPM, "ddpm", steps, model, learned_variance=True)
    assert samples.mean().item() == pytest.approx(M, abs=0.03)
    assert samples.std().item() == pytest.approx(S, rel=0.03)
    assert draw(DDPM, "ddpm", steps).std() < 0.9 * S  # the variance of the posterior is too small
    # DDIM ignores the variance.
    assert torch.equal(draw(DDPM, "ddim", steps, model, learned_variance=True), draw(DDPM, "ddim", steps))


@pytest.mark.parametrize(("diffusion", "sampler"), ALL)
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_data_of_a_single_point_are_reproduced_with_any_number_of_steps(
    diffusion: DiffusionConfig, sampler: str, steps: int
) -> None:
    samples = draw(diffusion, sampler, steps, ideal(diffusion, s=0.0))
    torch.testing.assert_close(samples, torch.full(SHAPE, M), rtol=0, atol=2e-4)


def test_euler_is_of_first_and_heun_of_second_order() -> None:
    def error(sampler: str, steps: int) -> float:
        return (draw(FLOW, sampler, steps) - (M + S * keyed_noise())).abs().mean().item()

    for sampler, order in (("euler", 1), ("heun", 2)):
        for steps in (16, 32):
            assert math.log2(error(sampler, steps) / error(sampler, 2 * steps)) == pytest.approx(order, abs=0.25)


def test_calls_of_the_model() -> None:
    """Timesteps that the model is called with, from noise to data, by sampler."""
    seen: list[float] = []

    def model(x: Tensor, timesteps: Tensor, condition: Tensor | None) -> Tensor:
        assert condition is None
        assert timesteps.shape == (4,)
        assert len(set(timesteps.tolist())) == 1
        seen.append(timesteps[0].item())
        return torch.zeros_like(x)

    expected = {
        "euler": [1000, 750, 500, 250],
        "heun": [1000, 750, 750, 500, 500, 250, 250],
        "ddpm": [999, 666, 333, 0],
        "ddim": [999, 666, 333, 0],
    }
    for diffusion, sampler in ALL:
        seen.clear()
        draw(diffusion, sampler, 4, model)
        assert seen == pytest.approx(expected[sampler])
    for diffusion, default in ((FLOW, "euler"), (DDPM, "ddpm")):
        unnamed = sample(ideal(diffusion), SHAPE, None, 3, 1.0, 0, diffusion=diffusion)
        assert torch.equal(unnamed, draw(diffusion, default, 3))


@pytest.mark.parametrize(("diffusion", "sampler"), ALL)
def test_a_sample_does_not_depend_on_its_batch(diffusion: DiffusionConfig, sampler: str) -> None:
    together = draw(diffusion, sampler, 5)
    apart = [draw(diffusion, sampler, 5, shape=(2, *SHAPE[1:]), first_index=i) for i in (0, 2)]
    assert torch.equal(together, torch.cat(apart))
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together, draw(diffusion, sampler, 5, seed=1))


def test_ddpm_draws_new_noise_at_every_step_but_the_last() -> None:
    """A chain of two steps, written out."""
    bar = ALPHAS_BAR[[0, 999]]
    beta = 1 - bar[1] / bar[0]
    x = keyed_noise()  # a prediction of no noise: x0 = x / sqrt(alpha_bar)
    mean = bar[0].sqrt() * beta / (1 - bar[1]) * x / bar[1].sqrt() + (1 - beta).sqrt() * (1 - bar[0]) / (1 - bar[1]) * x
    x = mean + (beta * (1 - bar[0]) / (1 - bar[1])).sqrt() * keyed_noise(draw=1)
    expected = (x / bar[0].sqrt()).float()
    torch.testing.assert_close(draw(DDPM, "ddpm", 2, lambda x, t, c: torch.zeros_like(x)), expected)


def of_label(x: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
    """A constant velocity: the label plus half the channel index."""
    return (condition.view(-1, 1, 1, 1, 1) + 0.5 * torch.arange(x.shape[1]).view(1, -1, 1, 1, 1)).float().expand_as(x)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("null", [7, torch.tensor(7), torch.tensor([7, 7, 7, 7])])
def test_guidance_goes_from_null_through_the_condition_on_all_channels(guidance: float, null: Tensor | int) -> None:
    labels, shape = torch.tensor([0, 1, 2, 3]), (4, 5, 1, 2, 2)
    batches: list[int] = []

    def model(x: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        batches.append(len(x))
        return of_label(x, timesteps, condition)

    changes = {"condition": labels, "guidance": guidance, "null_condition": null, "shape": shape}
    samples = draw(FLOW, "euler", 4, model, **changes)
    velocity = 7 + guidance * (labels - 7).view(-1, 1, 1, 1, 1) + 0.5 * torch.arange(5).view(1, -1, 1, 1, 1)
    torch.testing.assert_close(samples, keyed_noise(shape=shape) - velocity, rtol=0, atol=1e-4)
    assert batches == [4 if guidance == 1 else 8] * 4


def test_guidance_is_computed_in_fp32_for_any_dtype_of_the_model() -> None:
    """1 and 1 - 1/128 are exact in bfloat16; the guided value a hundredth beyond is not."""

    def model(x: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        return (1 - condition.view(-1, 1, 1, 1, 1) / 128).expand_as(x).bfloat16()

    samples = draw(FLOW, "euler", 1, model, condition=torch.zeros(4).long(), guidance=1.01, null_condition=1)
    assert samples.dtype == torch.float32
    torch.testing.assert_close(samples, keyed_noise() - 1 - 0.01 / 128, rtol=0, atol=1e-6)


def test_guidance_leaves_the_learned_variance_to_the_condition() -> None:
    """Noise channels are guided, variance channels are the conditional ones."""
    labels = torch.tensor([0, 1, 0, 1])

    def model(x: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        fraction = torch.where(condition == 9, 1.0, -0.5).view(-1, 1, 1, 1, 1).expand_as(x)
        return torch.cat([of_label(x, timesteps, condition), fraction], 1)

    def as_guided(x: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        guided = 9 + 2 * (condition - 9)
        return torch.cat([of_label(x, timesteps, guided), torch.full_like(x, -0.5)], 1)

    changes = {"condition": labels, "learned_variance": True}
    guided = draw(DDPM, "ddpm", 3, model, guidance=2.0, null_condition=9, **changes)
    torch.testing.assert_close(guided, draw(DDPM, "ddpm", 3, as_guided, **changes))


def test_a_transformer_is_sampled_in_its_own_batch_or_alone() -> None:
    config = ModelConfig(
        input=InputConfig(channels=2, height=4, width=4), hidden_size=16, num_heads=2, depth=2, num_classes=3
    )
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    labels, progress = torch.tensor([0, 1, 2, 0]), []
    changes = {"guidance": 2.0, "null_condition": 3}
    together = draw(
        FLOW,
        "heun",
        3,
        model,
        shape=(4, 2, 1, 4, 4),
        condition=labels,
        progress=lambda *p: progress.append(p),
        **changes,
    )
    alone = draw(FLOW, "heun", 3, model, shape=(1, 2, 1, 4, 4), condition=labels[2:3], first_index=2, **changes)
    torch.testing.assert_close(together[2:3], alone)  # up to the rounding of matrix products of another batch size
    assert together.dtype == torch.float32
    assert not together.requires_grad
    assert progress == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "ddim"}, "'ddim' does not fit diffusion.objective=flow: use euler or heun"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"diffusion": DDPM, "steps": 1001}, "between 1 and diffusion.num_timesteps=1000"),
        ({"shape": (2, 1, 4, 4)}, r"must be \[B, C, T, H, W\]"),
        ({"guidance": math.nan}, "guidance=nan must be a finite number"),
        ({"guidance": 2.0, "null_condition": 1}, "needs a condition and a null_condition"),
        ({"guidance": 2.0, "condition": torch.zeros(4).long()}, "needs a condition and a null_condition"),
        ({"condition": torch.zeros(3).long()}, "one label for each of the 4 samples"),
        (
            {"condition": torch.zeros(4).long(), "guidance": 2.0, "null_condition": torch.zeros(3).long()},
            "null_condition must be one label or one per sample",
        ),
        ({"learned_variance": True}, "learned_variance=true needs diffusion.objective=ddpm"),
    ],
)
def test_invalid_arguments_are_refused_before_the_model_is_called(changes: dict, message: str) -> None:
    def never(*_: object) -> Tensor:
        raise AssertionError("the model was called")

    arguments = {
        "shape": SHAPE,
        "condition": None,
        "steps": 2,
        "guidance": 1.0,
        "seed": 0,
        "diffusion": FLOW,
        **changes,
    }
    with pytest.raises(ConfigError, match=message):
        sample(never, **arguments)


def test_a_model_of_other_channels_is_refused() -> None:
    with pytest.raises(ConfigError, match="4 channels of that size were expected"):
        draw(DDPM, "ddpm", 2, learned_variance=True)


def test_guidance_by_captions_goes_from_the_empty_one() -> None:
    """The velocity is the sum of the caption's tokens; with guidance 3 it is null + 3 (caption - null)."""

    def model(x: Tensor, t: Tensor, text: TextCondition) -> Tensor:
        pull = (text.tokens[..., 0] * text.mask).sum(1) + text.pooled[:, 0]
        return pull.view(-1, 1, 1, 1, 1).expand_as(x)

    captions = TextCondition.from_captions([EncodedText(torch.ones(n, 1), torch.zeros(1)) for n in (2, 5)])
    empty = TextCondition.from_captions([EncodedText(torch.ones(1, 1), torch.full((1,), 0.5))])
    shape, flow = (2, 1, 1, 2, 2), DiffusionConfig(objective="flow")
    plain = sample(model, shape, captions, 4, 1.0, 7, diffusion=flow)
    guided = sample(model, shape, captions, 4, 3.0, 7, diffusion=flow, null_condition=empty)
    moved = (plain - guided)[:, 0, 0, 0, 0].tolist()  # the samples go against the velocity, from t = 1 to 0
    assert moved == pytest.approx([2 * (2 - 1.5), 2 * (5 - 1.5)])
    with pytest.raises(ConfigError, match="both be captions"):
        sample(model, shape, captions, 4, 3.0, 7, diffusion=flow, null_condition=3)
    with pytest.raises(ConfigError, match="a caption for each of 3"):
        sample(model, (3, 1, 1, 2, 2), captions, 4, 1.0, 7, diffusion=flow)
