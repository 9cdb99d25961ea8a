"""The noise schedules against published values, and the posterior against Bayes' rule."""

import math

import pytest
import torch

from rdm_scale.config import DiffusionConfig
from rdm_scale.diffusion.noise_schedule import NoiseSchedule, cosine_betas, linear_betas
from rdm_scale.errors import ConfigError


def chain(**changes: object) -> NoiseSchedule:
    return NoiseSchedule.from_config(DiffusionConfig(objective="ddpm", **changes))


def steps(*k: int) -> torch.Tensor:
    return torch.tensor(k)


def test_linear_betas_are_those_of_ddpm() -> None:
    betas = linear_betas(1000)
    assert betas[0].item() == pytest.approx(1e-4)
    assert betas[-1].item() == pytest.approx(0.02)
    assert betas.diff().std() < 1e-12
    # Ho et al. report D_KL(q(x_T | x_0) || N(0, I)) of about 1e-5 bits per dimension; alpha_bar_T is 4.036e-5.
    assert chain().alphas_bar[-1].item() == pytest.approx(4.036e-5, rel=1e-3)


def test_linear_betas_of_another_length_reach_about_the_same_noise() -> None:
    assert linear_betas(250)[[0, -1]].tolist() == pytest.approx([4e-4, 0.08])
    assert math.log(chain(num_timesteps=4000).alphas_bar[-1]) == pytest.approx(math.log(4.036e-5), rel=0.01)


@pytest.mark.parametrize("num_timesteps", [2, 20])
def test_a_linear_schedule_too_short_for_its_betas_is_refused(num_timesteps: int) -> None:
    with pytest.raises(ConfigError, match=f"num_timesteps={num_timesteps} is too short"):
        chain(num_timesteps=num_timesteps)


def test_cosine_schedule_follows_its_formula_and_is_capped() -> None:
    alphas_bar = chain(noise_schedule="cosine").alphas_bar
    start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    for k in (0, 499, 900):
        expected = math.cos(((k + 1) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 / start
        assert alphas_bar[k].item() == pytest.approx(expected, rel=1e-9)
    assert cosine_betas(1000)[-1].item() == 0.999
    assert (cosine_betas(1000)[:-1] < 0.999).all()


def test_noised_has_unit_variance_for_unit_data_and_is_inverted_by_predicted_x0() -> None:
    x0, noise = torch.randn(2, 3, 4, 1, 64, 64, generator=torch.Generator().manual_seed(0)).unbind(0)
    k = steps(0, 400, 999)
    x = chain().noised(x0, noise, k)
    torch.testing.assert_close(x.flatten(1).var(1), torch.ones(3), rtol=0.05, atol=0)
    torch.testing.assert_close(x[0], math.sqrt(0.9999) * x0[0] + 0.01 * noise[0])
    torch.testing.assert_close(chain().predicted_x0(x, noise, k), x0, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("k", [1, 10, 500, 999])
def test_posterior_is_the_normalized_product_of_prior_and_likelihood(k: int) -> None:
    """q(x_{k-1} | x_k, x_0) as the product of two normal densities, from betas alone."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    before = (1 - betas[:k]).prod().item()
    beta, x0, xk = betas[k].item(), 0.7, -0.4
    prior_precision, likelihood_precision = 1 / (1 - before), (1 - beta) / beta
    variance = 1 / (prior_precision + likelihood_precision)
    mean = variance * (prior_precision * before**0.5 * x0 + likelihood_precision * xk / (1 - beta) ** 0.5)

    def at(value: float) -> torch.Tensor:
        return torch.full((1, 1, 1, 1, 1), value)

    assert chain().posterior_mean(at(x0), at(xk), steps(k)).item() == pytest.approx(mean, rel=1e-4, abs=1e-6)
    assert chain().posterior_log_variance(steps(k)).item() == pytest.approx(math.log(variance), rel=1e-5)
    # The learned range runs from this variance to beta, in the logarithm.
    for fraction, expected in ((-1.0, variance), (1.0, beta), (0.0, math.sqrt(variance * beta))):
        log_variance = chain().learned_log_variance(at(fraction), steps(k)).item()
        assert log_variance == pytest.approx(math.log(expected), rel=1e-5)


def test_the_last_posterior_is_certain_and_its_log_variance_finite() -> None:
    x0, x1 = torch.randn(2, 1, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    torch.testing.assert_close(chain().posterior_mean(x0, x1, steps(0)), x0)
    assert chain().posterior_log_variance(steps(0)) == chain().posterior_log_variance(steps(1))


@pytest.mark.parametrize("count", [1, 2, 7, 50, 250, 999, 1000])
def test_respacing_keeps_the_marginals_of_evenly_spaced_steps(count: int) -> None:
    full, short = chain(), chain().respaced(count)
    stride = 999 / max(count - 1, 1)
    expected = [999] if count == 1 else [round(i * stride) for i in range(count)]
    assert short.timesteps.tolist() == expected
    assert len(set(expected)) == count
    assert torch.equal(short.alphas_bar, full.alphas_bar[expected])
    # The betas of the shortened chain give its alphas_bar.
    torch.testing.assert_close((1 - short.log_betas.exp()).cumprod(0), short.alphas_bar)


@pytest.mark.parametrize("count", [0, 1001])
def test_more_steps_than_the_chain_has_are_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=r"between 1 and diffusion\.num_timesteps=1000"):
        chain().respaced(count)
