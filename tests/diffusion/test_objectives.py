"""Objectives: the distribution of t, the paths, and the losses against numerical integrals."""

import math

import pytest
import torch
from torch import Tensor

from rdm_scale import rng
from rdm_scale.config import DiffusionConfig
from rdm_scale.diffusion import Objective, build_objective
from rdm_scale.diffusion.objectives import discretized_normal_nll, normal_kl
from rdm_scale.errors import ConfigError

SHAPE = (4, 3, 1, 4, 4)


def objective(name: str, learned_variance: bool = False, **changes: object) -> Objective:
    return build_objective(DiffusionConfig(objective=name, **changes), learned_variance)


def draws(which: Objective, count: int = 4000) -> Tensor:
    """t of `count` samples, each from its own generator."""
    return torch.tensor([which.draw_timestep(rng.generator(0, "timestep", i)) for i in range(count)])


def data(channels: int = 3) -> tuple[Tensor, Tensor]:
    x0, noise = torch.randn(2, SHAPE[0], channels, *SHAPE[2:], generator=torch.Generator().manual_seed(0)).unbind(0)
    return x0.clamp(-1, 1), noise


def test_uniform_flow_timesteps() -> None:
    t = draws(objective("flow"))
    for quantile in (0.1, 0.5, 0.9):
        assert t.quantile(quantile).item() == pytest.approx(quantile, abs=0.03)


def test_logit_normal_timesteps_have_the_quantiles_of_a_normal() -> None:
    t = draws(objective("flow", timestep_sampling="logit_normal", logit_mean=-0.5, logit_std=0.8))
    for deviations, share in ((-1, 0.1587), (0, 0.5), (1, 0.8413)):
        bound = 1 / (1 + math.exp(0.5 - 0.8 * deviations))
        assert (t < bound).float().mean().item() == pytest.approx(share, abs=0.03)


def test_ddpm_timesteps_are_every_step_equally_often() -> None:
    t = draws(objective("ddpm", num_timesteps=40))
    counts = torch.bincount(t.long(), minlength=40)
    assert torch.equal(t, t.round())
    assert len(counts) == 40
    assert 60 < counts.min() <= counts.max() < 150  # 100 expected; four standard deviations are 40


def test_model_timesteps_range_up_to_about_1000() -> None:
    t = torch.tensor([0.0, 0.25, 1.0])
    assert objective("flow").model_timesteps(t).tolist() == [0, 250, 1000]
    assert objective("ddpm").model_timesteps(999 * t[::2]).tolist() == [0, 999]


def test_flow_runs_from_data_to_noise_at_the_target_velocity() -> None:
    flow, (x0, noise) = objective("flow"), data()
    t = torch.tensor([0.0, 0.3, 0.7, 1.0])
    x = flow.noised(x0, noise, t)
    assert torch.equal(x[0], x0[0])
    assert torch.equal(x[3], noise[3])
    velocity = (flow.noised(x0, noise, t + 0.01) - flow.noised(x0, noise, t - 0.01)) / 0.02
    assert flow.loss(velocity, x0, noise, t, x).max() < 1e-8
    torch.testing.assert_close(flow.loss(velocity + 0.5, x0, noise, t, x), torch.full((4,), 0.25))


def test_simple_ddpm_loss_is_the_squared_error_of_the_noise_in_fp32() -> None:
    ddpm, (x0, noise) = objective("ddpm"), data()
    t = torch.tensor([0.0, 10.0, 500.0, 999.0])
    offset = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(-1, 1, 1, 1, 1)
    loss = ddpm.loss(noise + offset, x0, noise, t, ddpm.noised(x0, noise, t))
    torch.testing.assert_close(loss, torch.tensor([0.0, 1.0, 4.0, 9.0]))
    assert ddpm.loss((noise + offset).bfloat16(), x0, noise, t, x0).dtype == torch.float32


def test_normal_kl_is_the_integral() -> None:
    mean1, log_variance1, mean2, log_variance2 = (torch.tensor(v, dtype=torch.float64) for v in (0.3, -0.8, -0.5, 0.4))
    x = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    log_p, log_q = (
        -0.5 * ((x - m) ** 2 / v.exp() + v + math.log(2 * math.pi))
        for m, v in ((mean1, log_variance1), (mean2, log_variance2))
    )
    integral = torch.trapezoid(log_p.exp() * (log_p - log_q), x)
    torch.testing.assert_close(normal_kl(mean1, log_variance1, mean2, log_variance2), integral, rtol=1e-6, atol=0)
    assert normal_kl(mean1, log_variance1, mean1, log_variance1) == 0


def test_discretized_nll_is_the_integral_over_the_bin() -> None:
    mean, log_variance = torch.tensor(0.13), torch.tensor(2 * math.log(0.02))
    x = torch.linspace(-1, 1, 256)
    nll = discretized_normal_nll(x, mean, log_variance)
    near = (x - mean).abs() < 0.08
    for value, got in zip(x[near].double(), nll[near], strict=True):
        bin_ = torch.linspace(value - 1 / 255, value + 1 / 255, 401, dtype=torch.float64)
        density = (-0.5 * ((bin_ - 0.13) / 0.02) ** 2).exp() / (0.02 * math.sqrt(2 * math.pi))
        assert got.item() == pytest.approx(-torch.trapezoid(density, bin_).log().item(), rel=1e-3)
    assert near.sum() > 15


def test_the_probabilities_of_all_bins_add_up_to_one() -> None:
    """The first and last bin are unbounded, so this holds for any mean."""
    x = torch.linspace(-1, 1, 256)
    for mean in (-1.4, -1.0, 0.0, 0.9, 1.3):
        total = (-discretized_normal_nll(x, torch.tensor(mean), torch.tensor(2 * math.log(0.3)))).exp().sum()
        assert total.item() == pytest.approx(1, abs=1e-5)


def test_the_upper_tail_is_as_exact_as_the_lower() -> None:
    """Five standard deviations from the mean, where 1 - P(below) is 0 in float32."""
    x, mean, log_variance = torch.tensor([-0.8, 0.8]), torch.tensor(0.0), torch.tensor(2 * math.log(0.15))
    lower, upper = discretized_normal_nll(x, mean, log_variance)
    assert lower == upper
    tail = [0.5 * math.erfc((0.8 + s / 255) / 0.15 / math.sqrt(2)) for s in (-1, 1)]
    assert lower.item() == pytest.approx(-math.log(tail[0] - tail[1]), rel=1e-3)


@pytest.mark.parametrize("fraction", [-1.0, 0.2, 1.0])
def test_the_bound_of_a_perfect_mean_is_the_divergence_of_the_variances(fraction: float) -> None:
    """Expected bits per dimension from betas alone: 0.5 (r - 1 - log r) / log 2 with the ratio r of the variances."""
    hybrid, (x0, noise) = objective("ddpm", learned_variance=True), data()
    t = torch.tensor([1.0, 30.0, 500.0, 999.0])
    loss = hybrid.loss(
        torch.cat([noise, torch.full_like(noise, fraction)], 1), x0, noise, t, hybrid.noised(x0, noise, t)
    )
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    for got, k in zip(loss, t.long().tolist(), strict=True):
        before, upto = (1 - betas[:k]).prod(), (1 - betas[: k + 1]).prod()
        ratio = (1 - before) / (1 - upto)  # posterior variance over beta
        ratio = ratio ** ((1 + fraction) / 2)
        assert got.item() == pytest.approx((0.5 * (ratio - 1 - ratio.log()) / math.log(2)).item(), rel=2e-3, abs=1e-6)


def test_the_bound_of_the_first_step_is_the_likelihood_of_the_data() -> None:
    hybrid, (x0, noise) = objective("ddpm", learned_variance=True), data()
    t = torch.zeros(SHAPE[0])
    prediction = torch.cat([noise, torch.ones_like(noise)], 1)  # a perfect mean, and the variance beta_0 = 1e-4
    loss = hybrid.loss(prediction, x0, noise, t, hybrid.noised(x0, noise, t))
    inside, edge = math.erf(1 / 255 / 0.01 / math.sqrt(2)), 0.5 + 0.5 * math.erf(1 / 255 / 0.01 / math.sqrt(2))
    at_edge = (x0.abs() > 0.999).double()
    bits = -(at_edge * math.log2(edge) + (1 - at_edge) * math.log2(inside)).flatten(1).mean(1)
    torch.testing.assert_close(loss.double(), bits, rtol=1e-3, atol=0)


def test_the_bound_trains_the_variance_only() -> None:
    hybrid, (x0, noise) = objective("ddpm", learned_variance=True), data()
    t = torch.tensor([0.0, 3.0, 500.0, 999.0])
    prediction = torch.randn(4, 6, 1, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    hybrid.loss(prediction, x0, noise, t, hybrid.noised(x0, noise, t)).sum().backward()
    squared_error_gradient = 2 * (prediction[:, :3] - noise) / noise[0].numel()
    torch.testing.assert_close(prediction.grad[:, :3], squared_error_gradient.detach())
    assert prediction.grad.isfinite().all()
    assert (prediction.grad[:, 3:].flatten(1).abs().amax(1) > 0).all()


def test_learned_variance_needs_ddpm() -> None:
    with pytest.raises(ConfigError, match=r"learned_variance=true needs diffusion\.objective=ddpm"):
        objective("flow", learned_variance=True)
