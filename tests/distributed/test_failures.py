"""Failures during training: no checkpoint is lost, and no incomplete one stays."""

import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import pytest

from rdm_scale.checkpoint import CheckpointDirectory, saver
from rdm_scale.config import RunConfig
from rdm_scale.errors import CheckpointError, ConfigError, NonFiniteError
from rdm_scale.storage.location import Location
from tests.support.rank_pool import RankPool
from tests.support.small_runs import metrics, run_config, train, write_latents


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_latents(tmp_path_factory.mktemp("latents"))


def steps_saved(config: RunConfig) -> list[int]:
    return CheckpointDirectory(Location(config.run.dir) / "checkpoints").steps()


@pytest.mark.parametrize("every", [1, 0])
def test_a_diverging_run_stops_before_it_saves(ranks: RankPool, data: str, tmp_path: Path, every: int) -> None:
    """A step is read at once where a save follows, else when the next one is under way."""
    good = run_config(tmp_path, data, train__steps=3)
    ranks.run(2, train, good)
    diverging = {"train__steps": 9, "optimizer__lr": 1e30, "optimizer__warmup_steps": 0}
    bad = run_config(tmp_path, data, **diverging, checkpoint__every=every)
    with pytest.raises(NonFiniteError, match=r"of step \d+ is (nan|inf), on (the samples with ids 1|every sample)"):
        ranks.run(2, train, bad)
    last = metrics(bad.run.dir)[-1]["step"]
    assert steps_saved(bad)[-1] == (last if every else 3)
    report = json.loads((Path(bad.run.dir) / f"non_finite_step_{last + 1:08d}.json").read_text())
    assert report["step"] == last + 1 and set(report["sample_ids"]) <= set(range(1000, 1096))


def train_with_small_files(config: RunConfig, limit: int) -> None:
    """Run on each rank, as on a full disk: rank 1 cannot write files beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failed_checkpoint_keeps_the_previous_one(ranks: RankPool, data: str, tmp_path: Path) -> None:
    ranks.run(2, train, run_config(tmp_path, data, train__steps=4))
    config = run_config(tmp_path, data, train__steps=6)
    with pytest.raises(CheckpointError, match="step_00000006"):
        ranks.run(2, train_with_small_files, config, 100_000)
    folder = Path(config.run.dir) / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["owner.json", "step_00000004"]
    ranks.run(2, train, config)
    assert [r["step"] for r in metrics(config.run.dir)] == [1, 2, 3, 4, 5, 6]


def train_with_own_learning_rate(config: RunConfig) -> None:
    lr = 1e-3 * (1 + int(os.environ["RANK"]))
    train(config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"lr": lr})}))


def test_ranks_with_different_configurations_refuse_to_start(ranks: RankPool, data: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rank 1 on .* and rank 0 on .* differ in configuration"):
        ranks.run(2, train_with_own_learning_rate, run_config(tmp_path, data))
    assert not (tmp_path / "run").exists()


def test_old_checkpoints_are_removed(ranks: RankPool, data: str, tmp_path: Path) -> None:
    config = run_config(tmp_path, data, train__steps=7, checkpoint__every=2, checkpoint__keep=2)
    ranks.run(1, train, config)
    assert steps_saved(config) == [6, 7]


def train_with_an_update_to_nan(config: RunConfig, step: int) -> None:
    """Run on each rank: as an update in low precision may, that of `step` leaves a NaN in the weights of one rank."""
    from rdm_scale.parallel.parallel_model import ParallelModel

    update, done = ParallelModel.update_ema, 0

    def damaging(model: ParallelModel, decay: float) -> None:
        nonlocal done
        done += 1
        update(model, decay)
        if done == step and os.environ["RANK"] == "1":
            held = next(each for each in model.ranges if each.name == "head.out.weight" and each.numel)
            begin = 0
            for flat in model.state().weights:
                if begin <= held.start < begin + flat.numel():
                    flat.view(-1)[held.start - begin] = float("nan")
                begin += flat.numel()

    ParallelModel.update_ema = damaging  # type: ignore[method-assign]
    train(config)


def test_weights_that_an_update_made_nan_are_not_saved(ranks: RankPool, data: str, tmp_path: Path) -> None:
    """The loss and gradient norm of that step were finite. Training on without the checkpoint would be in vain."""
    config = run_config(tmp_path, data, train__steps=3, checkpoint__on_failure="continue")
    with pytest.raises(NonFiniteError, match=r"step_00000003 is not saved: the weights of head.out.weight hold NaN"):
        ranks.run(2, train_with_an_update_to_nan, config, 3)
    assert [record["step"] for record in metrics(config.run.dir)] == [1, 2, 3]
    assert not (Path(config.run.dir) / "checkpoints/step_00000003").exists()


def test_nan_weights_are_not_blamed_on_samples(ranks: RankPool, data: str, tmp_path: Path) -> None:
    config = run_config(tmp_path, data, train__steps=9)
    with pytest.raises(NonFiniteError, match=r"the weights of .*head.out.weight.* an update made them so"):
        ranks.run(2, train_with_an_update_to_nan, config, 3)


def save_without_a_look(config: RunConfig) -> None:
    """Run on each rank: train with an update to NaN, and save as earlier versions did."""
    from rdm_scale.checkpoint.format import writer

    writer.refuse_non_finite_slices = lambda *_: None
    train_with_an_update_to_nan(config, 2)


def test_a_run_does_not_go_on_from_weights_that_are_nan(ranks: RankPool, data: str, tmp_path: Path) -> None:
    ranks.run(2, save_without_a_look, run_config(tmp_path, data, train__steps=2))
    refused = r"step_00000002 is complete, but cannot be used: the weights of head.out.weight hold NaN or infinity"
    with pytest.raises(NonFiniteError, match=refused):
        ranks.run(1, train, run_config(tmp_path, data, train__steps=4))
    begun = {"checkpoint__start_from": str(tmp_path / "run"), "checkpoint__start_weights": "raw"}
    with pytest.raises(NonFiniteError, match=r"cannot be used: the raw weights of head.out.weight"):
        ranks.run(1, train, run_config(tmp_path / "new", data, train__steps=4, **begun))


def train_with_slow_disk(config: RunConfig) -> None:
    """Run on each rank: rank 1 takes long to write its part of a checkpoint."""
    if os.environ["RANK"] == "1":
        write = saver.write_tensors

        def slowly(*arguments: Any) -> Any:
            time.sleep(30)
            return write(*arguments)

        saver.write_tensors = slowly
    train(config)


def test_a_save_that_takes_too_long_ends_the_run(ranks: RankPool, data: str, tmp_path: Path) -> None:
    config = run_config(tmp_path, data, train__steps=1, checkpoint__timeout_s=1)
    with pytest.raises(CheckpointError, match=r"of step 1 was not saved within checkpoint\.timeout_s=1: "):
        ranks.run(2, train_with_slow_disk, config)
