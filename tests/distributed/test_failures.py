"""Failures during training: no checkpoint is lost, and no incomplete one stays."""

import json
import os
import resource
from pathlib import Path

import pytest

from rdm_scale.checkpoint import CheckpointDirectory
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
    with pytest.raises(NonFiniteError, match=r"of step \d+ is (nan|inf), on the samples with ids 1\d\d\d, "):
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
    assert [p.name for p in folder.iterdir()] == ["step_00000004"]
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
