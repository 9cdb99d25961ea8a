"""Rates of a step, and the estimate at the start of a run, against figures worked out by hand."""

import subprocess
import sys

import pytest
import torch

from rdm_scale.config import RunConfig, load_config
from rdm_scale.cost import model_flops
from rdm_scale.parallel.plan import plan_parallelism
from rdm_scale.training.throughput import Peak, Throughput, best_case, clock_time, find_peak

GFLOP = 236.9e9  # of the forward of DiT-XL/2 on one sample: twice the 118.6e9 multiply-adds of its paper


def dit_xl(*overrides: str) -> RunConfig:
    return load_config("configs/dit_xl.yaml", ["train.global_batch_size=64", *overrides])


def test_rates_of_a_step_of_dit_xl() -> None:
    """64 samples in 0.184 s on 2 ranks: 64 x 3 x 0.237 TFLOP / 0.184 s / 2 = 124 TFLOP/s, 12.4 % of 1,000."""
    rates = Throughput(dit_xl(), 2, Peak(1000.0, "stated")).rates((1, 32, 32), 0.184)
    assert rates["samples_per_s"] == 64 / 0.184
    assert rates["tflops_per_rank"] == pytest.approx(64 * 3 * GFLOP / 0.184 / 2 / 1e12, rel=0.01)
    assert rates["mfu"] == pytest.approx(0.124, rel=0.01)


def test_flops_follow_the_size_of_the_samples_and_not_the_configured_one() -> None:
    config = dit_xl()
    throughput = Throughput(config, 1, None)
    for size in ((1, 32, 32), (1, 64, 32), (1, 32, 32)):
        expected = 64 * 3 * model_flops(config.model, size) / 2.0 / 1e12
        assert throughput.rates(size, 2.0) == {"samples_per_s": 32.0, "tflops_per_rank": expected}


def test_recomputation_does_not_count() -> None:
    plain, recomputed = (Throughput(dit_xl(f"parallel.recompute={r}"), 1, None) for r in ("none", "full"))
    assert plain.rates((1, 32, 32), 1.0) == recomputed.rates((1, 32, 32), 1.0)


def test_a_cpu_has_no_peak_unless_it_is_stated() -> None:
    cpu = torch.device("cpu")
    assert find_peak(dit_xl(), cpu) is None
    assert find_peak(dit_xl("monitor.peak_tflops=2.5"), cpu) == Peak(2.5, "monitor.peak_tflops")


def test_the_estimate_of_one_rank() -> None:
    """64 x 3 x 0.2373 TFLOP = 45.6 at 100 TFLOP/s: 0.456 s a step, 64 / 0.456 = 140 samples/s, 456 s for 1,000."""
    config = dit_xl()
    line = best_case(config, plan_parallelism(config, 1, None), Peak(100.0, "stated"), 1000)
    seconds = 64 * 3 * model_flops(config.model) / 100e12
    assert seconds == pytest.approx(0.456, abs=0.001)
    assert line == (
        f"estimate: at best {seconds:.3f} s a step, {64 / seconds:.0f} samples/s and 0:07:35 for 1,000 steps, if all "
        "45.6 TFLOP of a step ran at 100 TFLOP/s a rank (stated)"
    )


def test_the_estimate_counts_ranks_recomputation_and_the_bubble() -> None:
    """1F1B of 2 stages and 4 micro-batches idles 1 / 5 of the time; full recompute adds a third, all but the ends."""
    layout = ["parallel.pipeline=2", "parallel.recompute=full", "train.micro_batch_size=16"]
    config = dit_xl(*layout)
    plan = plan_parallelism(config, 2, None)
    assert plan.bubble == pytest.approx(0.2, abs=0.01)
    line = best_case(config, plan, Peak(100.0, "stated"), 10)
    seconds = float(line.split("at best ")[1].split(" s ")[0])
    assert seconds == pytest.approx(0.4556 * 4 / 3 / 2 / 0.8, rel=0.02) and "bubble of 20" in line


def test_durations_are_hours_minutes_and_seconds() -> None:
    assert [clock_time(s) for s in (0, 59.9, 3661, 360_000)] == ["0:00:00", "0:00:59", "1:01:01", "100:00:00"]


def test_a_dry_run_with_a_stated_peak_estimates_the_run() -> None:
    config = ["configs/dit_xl.yaml", "monitor.peak_tflops=400", "--dry-run", "--world-size=8"]
    command = [sys.executable, "-m", "rdm_scale.train", *config]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "estimate: at best 0.0569 s a step" in done.stdout and "400,000 steps" in done.stdout
