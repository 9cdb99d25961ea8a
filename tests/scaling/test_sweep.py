"""Sweeps: sizes along an axis, budgets, schedules, refusals, and the file."""

import shlex
from pathlib import Path

import pytest

from rdm_scale import cost
from rdm_scale.errors import ConfigError, DataError
from rdm_scale.scaling.guards import check_sweep
from rdm_scale.scaling.sweep import plan_sweep, read_sweep, slurm_array, write_sweep

CONFIG = "configs/quickstart.yaml"
BASE = ["model.base_depth=6", "model.base_width=96"]


def test_sizes_lengths_and_seeds(tmp_path: Path) -> None:
    sweep = plan_sweep(CONFIG, BASE, axis="depth", budget=4e13, sizes=4, lengths=[100, 400], seeds=2)
    assert len(sweep.runs) == 4 * 2 * 2
    sizes = sorted({run.parameters for run in sweep.runs})
    assert sizes[-1] / sizes[0] == pytest.approx(16, rel=0.35)  # depths are integers
    for run in sweep.runs:
        config = sweep.run_config(run, tmp_path)
        assert cost.model_parameters(config.model).total == run.parameters
        assert run.samples == run.steps * 64
        assert run.flops == 3 * cost.model_flops(config.model) * run.samples
        assert config.train.steps == run.steps == config.optimizer.schedule_steps
        assert config.optimizer.warmup_steps == run.steps // 10
        assert config.train.seed == run.seed
        assert config.model.hidden_size == 96 and config.model.depth == run.depth
    largest = max(run.flops for run in sweep.runs)
    one_block_more = 3 * cost.block_flops(sweep.run_config(sweep.runs[0], tmp_path).model) * 400 * 64
    assert largest <= 4e13 < largest + one_block_more


@pytest.mark.parametrize("axis", ["width", "both"])
def test_heads_keep_their_size(axis: str, tmp_path: Path) -> None:
    sweep = plan_sweep(CONFIG, BASE, axis=axis, budget=2e12, sizes=3, lengths=[100], seeds=1)
    models = [sweep.run_config(run, tmp_path).model for run in sweep.runs]
    assert all(model.hidden_size // model.num_heads == 24 for model in models)
    assert len({model.hidden_size for model in models}) == 3
    for model in models:
        expected = 6 if axis == "width" else max(2, round(6 * model.hidden_size / 96))
        assert model.depth == expected


def test_a_held_out_run_is_larger_and_longer_by_its_factor() -> None:
    sweep = plan_sweep(CONFIG, BASE, axis="depth", budget=2e12, sizes=3, lengths=[100], seeds=2, held_out_factor=8)
    held_out = [run for run in sweep.runs if run.held_out]
    fitted = [run for run in sweep.runs if not run.held_out]
    assert [run.seed for run in held_out] == [0, 1]
    assert held_out[0].flops / max(run.flops for run in fitted) == pytest.approx(8, rel=0.05)
    assert held_out[0].steps > 100 and held_out[0].parameters > max(run.parameters for run in fitted)
    assert slurm_array(Path("sweep.yaml"), sweep).count("--array=0,1,2,3,4,5\n") == 1
    command = slurm_array(Path("my $sweeps/it's.yaml"), sweep).splitlines()[-1]
    assert shlex.split(command)[3] == str(Path("my $sweeps/it's.yaml").resolve())


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.base_depth"):
        plan_sweep(CONFIG, [], axis="depth", budget=2e12, sizes=3, lengths=[100], seeds=1)
    with pytest.raises(ConfigError, match="times as large"):
        plan_sweep(CONFIG, BASE, axis="depth", budget=1e6, sizes=3, lengths=[100], seeds=1)
    (tmp_path / "odd.yaml").write_text("runs: 3")
    with pytest.raises(ConfigError, match="no sweep"):
        read_sweep(tmp_path / "odd.yaml")


def test_a_sweep_survives_its_file(tmp_path: Path) -> None:
    sweep = plan_sweep(CONFIG, BASE, axis="both", budget=2e12, sizes=3, lengths=[100], seeds=1)
    write_sweep(tmp_path / "sweep.yaml", sweep)
    assert read_sweep(tmp_path / "sweep.yaml") == sweep


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    sweep = plan_sweep(CONFIG, BASE, axis="depth", budget=2e12, sizes=3, lengths=[100], seeds=1)
    assert check_sweep(tmp_path, sweep) == []

    def changed(override: str) -> list[str]:
        first = sweep.runs[0]
        other = type(first)(**vars(first) | {"overrides": (*first.overrides, override)})
        return check_sweep(tmp_path, type(sweep)(sweep.config, sweep.overrides, sweep.axis, (other, *sweep.runs[1:])))

    with pytest.raises(DataError, match="2 different validation losses"):
        changed("monitor.validation_samples=100")
    with pytest.raises(DataError, match="2 different validation losses"):
        changed("diffusion.logit_std=2")
    with pytest.raises(DataError, match="ends at step 90 and the run at 100"):
        changed("optimizer.schedule_steps=90")
    assert "more than a fifth" in changed("optimizer.warmup_steps=30")[0]
