"""Checkpoints are written one at a time while training continues, and failures are reported."""

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rdm_scale.checkpoint import CheckpointDirectory, load_model
from rdm_scale.checkpoint import saver as saving
from rdm_scale.checkpoint.ownership import Ownership
from rdm_scale.config import RunConfig
from rdm_scale.errors import CheckpointError, OwnershipError
from rdm_scale.storage.location import Location
from rdm_scale.training.run_directory import read_run_id
from tests.support.limits import HANG_S
from tests.support.rank_pool import RankPool
from tests.support.small_runs import metrics, run_config, train, write_latents

WRITE = saving.write_tensors


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_latents(tmp_path_factory.mktemp("latents"))


def steps_saved(config: RunConfig) -> list[int]:
    return CheckpointDirectory(Location(config.run.dir) / "checkpoints").steps()


def train_with(write: Callable[..., Any], config: RunConfig) -> str:
    """Run on each rank: train with `write` in place of `write_tensors`, and return the reports of rank 0."""
    reports: list[str] = []
    saving.write_tensors = lambda folder, rank, *more: write(config, folder, rank, *more)
    finish = saving.Saver.finish

    def watched_finish(saver: saving.Saver) -> None:
        if saver.mesh.is_first:
            waiting_in(config).touch()
        finish(saver)

    saving.Saver.finish = watched_finish
    from rdm_scale.training.monitor import RunMonitor

    RunMonitor.report = lambda self, message: reports.append(message)
    train(config)
    return "\n".join(reports)


def write_three_steps_later(config: RunConfig, folder: Location, rank: int, *more: Any) -> Any:
    step, path = int(folder.name.removeprefix("step_")), Path(config.run.dir) / "metrics.jsonl"
    deadline = time.monotonic() + HANG_S
    while path.read_bytes().count(b"\n") < min(step + 3, config.train.steps):
        assert time.monotonic() < deadline, "training waits for the checkpoint"
        time.sleep(0.002)
    return WRITE(folder, rank, *more)


def test_training_continues_while_a_checkpoint_is_written(ranks: RankPool, data: str, tmp_path: Path) -> None:
    config = run_config(tmp_path, data, train__steps=9, checkpoint__every=4)
    reported, _ = ranks.run(2, train_with, write_three_steps_later, config)
    assert steps_saved(config) == [4, 8, 9]
    assert reported.count("saved ") == 3
    # The rest of the write may take a slow disk longer than the steps to the next save; nothing else is warned of.
    assert reported.count("warning") == reported.count("was still being written when the next was due")
    for step in (4, 8):
        alone = run_config(tmp_path / str(step), data, train__steps=step)
        ranks.run(2, train, alone)
        for kind in ("weights", "ema"):
            expected = load_model(alone.run.dir, kind).state_dict()
            found = load_model(f"{config.run.dir}/checkpoints/step_{step:08d}", kind).state_dict()
            assert all(torch.equal(found[name], expected[name]) for name in expected), (step, kind)
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    stalls = {r["step"]: r["save_stall_s"] for r in map(json.loads, lines) if "save_stall_s" in r}
    assert list(stalls) == [5, 9]


def train_with_late_commits(config: RunConfig) -> None:
    """Run on each rank: train, and complete each checkpoint six steps after its own."""
    commit = CheckpointDirectory.commit

    def late(self: CheckpointDirectory, step: int, *more: Any) -> Any:
        path, deadline = Path(config.run.dir) / "metrics.jsonl", time.monotonic() + HANG_S
        while path.read_bytes().count(b"\n") < min(step + 6, config.train.steps):
            assert time.monotonic() < deadline, "training waits for the commit"
            time.sleep(0.002)
        return commit(self, step, *more)

    CheckpointDirectory.commit = late  # type: ignore[method-assign]
    train(config)


def test_training_continues_while_a_checkpoint_is_committed(ranks: RankPool, data: str, tmp_path: Path) -> None:
    """Also where the ranks said, in a step before, that they had nothing to write any more."""
    config = run_config(tmp_path, data, train__steps=16, checkpoint__every=8)
    ranks.run(2, train_with_late_commits, config)
    assert steps_saved(config) == [8, 16]


def waiting_in(config: RunConfig) -> Path:
    """A file that exists from when rank 0 first waits for a save."""
    return Path(config.run.dir) / "waiting"


def write_slowly(config: RunConfig, folder: Location, rank: int, *more: Any) -> Any:
    if rank == 1 and folder.name == "step_00000002":
        deadline = time.monotonic() + HANG_S
        while not waiting_in(config).exists():
            assert time.monotonic() < deadline, "training does not wait for the checkpoint"
            time.sleep(0.01)
        time.sleep(0.2)  # only waits of more than 0.1 s are reported
    return WRITE(folder, rank, *more)


def test_a_slow_save_is_reported_and_waited_for(ranks: RankPool, data: str, tmp_path: Path) -> None:
    config = run_config(tmp_path, data, train__steps=5, checkpoint__every=2)
    reported, _ = ranks.run(2, train_with, write_slowly, config)
    assert steps_saved(config) == [2, 4, 5]
    assert "warning: the checkpoint of step 2 was still being written when the next was due" in reported
    assert reported.index("step_00000002 (in") < reported.index("step_00000004 (in")


def write_on_a_full_disk(config: RunConfig, folder: Location, rank: int, *more: Any) -> Any:
    full = int(os.environ.get("FULL_AT", "4"))
    if rank == 1 and folder.name == f"step_{full:08d}":
        (folder / "rank_00001.safetensors").write(b"half")
        raise CheckpointError(f"cannot write {folder}: {os.strerror(errno.ENOSPC)}")
    return WRITE(folder, rank, *more)


def test_a_failed_save_stops_the_run_as_configured(ranks: RankPool, data: str, tmp_path: Path) -> None:
    changes = {"train__steps": 6, "checkpoint__every": 2}
    stops = run_config(tmp_path / "stops", data, **changes)
    with pytest.raises(CheckpointError, match="step_00000004: No space left on device"):
        ranks.run(2, train_with, write_on_a_full_disk, stops)
    assert steps_saved(stops) == [2]
    goes_on = run_config(tmp_path / "goes_on", data, **changes, checkpoint__on_failure="continue")
    reported, _ = ranks.run(2, train_with, write_on_a_full_disk, goes_on)
    assert "warning: no checkpoint of step 4, training continues without it: cannot write" in reported
    assert steps_saved(goes_on) == [2, 6]
    left = {path.name for path in (tmp_path / "goes_on/run/checkpoints").glob("step_*")}
    assert left == {"step_00000002", "step_00000006"}, "the incomplete checkpoint is removed"
    ranks.run(2, train, stops)
    assert metrics(stops.run.dir) == metrics(goes_on.run.dir)


def test_the_last_save_must_not_fail(ranks: RankPool, data: str, tmp_path: Path) -> None:
    config = run_config(tmp_path, data, train__steps=4, checkpoint__every=2, checkpoint__on_failure="continue")
    with pytest.raises(CheckpointError, match="the last checkpoint, of step 4, could not be saved"):
        ranks.run(2, train_with, write_on_a_full_disk, config)
    assert steps_saved(config) == [2]


def test_checkpoints_that_resume_skips_are_reported(ranks: RankPool, data: str, tmp_path: Path) -> None:
    config = run_config(tmp_path, data, train__steps=4, checkpoint__every=2)
    ranks.run(2, train, config)
    whole = metrics(config.run.dir)
    folder = Path(config.run.dir) / "checkpoints"
    (folder / "step_00000004" / "rank_00001.safetensors").write_bytes(b"cut")
    (folder / "step_00000007").mkdir()
    reported, _ = ranks.run(2, train_with, write_slowly, config)
    assert "warning: skipped" in reported and "step_00000007 has no commit.json" in reported
    assert "step_00000004/rank_00001.safetensors has 3 bytes instead of" in reported
    assert metrics(config.run.dir) == whole
    assert steps_saved(config) == [2, 4]


def write_where_nothing_can_be_removed(config: RunConfig, folder: Location, rank: int, *more: Any) -> Any:
    def refuse(self: CheckpointDirectory, *_: int) -> None:
        raise CheckpointError("cannot remove step_00000002: Operation not permitted")

    CheckpointDirectory.prune = refuse  # type: ignore[method-assign]
    return WRITE(folder, rank, *more)


def test_a_failed_removal_of_older_checkpoints_is_only_a_warning(ranks: RankPool, data: str, tmp_path: Path) -> None:
    config = run_config(tmp_path, data, train__steps=4, checkpoint__every=2, checkpoint__keep=1)
    reported, _ = ranks.run(2, train_with, write_where_nothing_can_be_removed, config)
    assert steps_saved(config) == [2, 4]
    assert (
        "warning: checkpoints older than checkpoint.keep are not removed yet: cannot remove step_00000002" in reported
    )


def test_checkpoints_of_keep_every_are_not_removed(ranks: RankPool, data: str, tmp_path: Path) -> None:
    changes = {"checkpoint__every": 2, "checkpoint__keep": 1, "checkpoint__keep_every": 4}
    config = run_config(tmp_path, data, train__steps=7, **changes)
    ranks.run(1, train, config)
    assert steps_saved(config) == [4, 7]


def write_after_another_process_has_taken_over(config: RunConfig, folder: Location, rank: int, *more: Any) -> Any:
    records = WRITE(folder, rank, *more)
    if rank == 0:
        Ownership.claim(folder.parent, str(read_run_id(Path(config.run.dir))), "elsewhere").close()
    return records


def test_a_process_that_was_replaced_writes_nothing_more(ranks: RankPool, data: str, tmp_path: Path) -> None:
    """Neither commit nor removal: the folders are the successor's. `checkpoint.on_failure` does not matter."""
    config = run_config(tmp_path, data, train__steps=40, checkpoint__every=2, checkpoint__on_failure="continue")
    with pytest.raises(OwnershipError, match="was taken over by the run in elsewhere"):
        ranks.run(2, train_with, write_after_another_process_has_taken_over, config)
    assert steps_saved(config) == []
    step_2 = Path(config.run.dir) / "checkpoints/step_00000002"
    assert {file.name for file in step_2.glob("*.index.safetensors")} == {
        "rank_00000.index.safetensors", "rank_00001.index.safetensors"
    }  # fmt: skip
