"""Runs killed at any moment resume bit for bit from their newest complete checkpoint."""

import os
import random
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from rdm_scale.config import to_yaml
from tests.support.launching import Starter, finish, torchrun
from tests.support.limits import HANG_S
from tests.support.small_runs import metrics, run_config, write_latents

VICTIMS = ("a rank", "all", "the launcher")
EVERY = 2


def steps_done(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def checkpoints(run_dir: Path, complete: bool) -> list[int]:
    """Steps of the complete or of the incomplete checkpoints."""
    folders = (run_dir / "checkpoints").glob("step_*")
    return sorted(int(f.name[5:]) for f in folders if (f / "commit.json").exists() == complete)


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [pid for pid in map(int, children) if b"rdm_scale.train" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait(condition: bool, launcher: subprocess.Popen, deadline: float) -> bool:
    """True while `condition` does not hold; fails if the run hangs or has ended."""
    assert time.monotonic() < deadline and launcher.poll() is None, "the run hangs, or has ended"
    return not condition


def stop_during_save(launcher: subprocess.Popen, run_dir: Path, deadline: float) -> list[int]:
    """Stop the ranks while a checkpoint is incomplete, and return them.

    A save takes a few milliseconds, so that it may be complete by the time that a busy machine kills the ranks. What is
    incomplete while they stand still is so when they die.
    """
    while True:
        while wait(bool(checkpoints(run_dir, complete=False)), launcher, deadline):
            pass
        ranks = ranks_of(launcher)
        send(ranks, signal.SIGSTOP)
        while wait(all(state_of(rank) in "TZ" for rank in ranks), launcher, deadline):
            time.sleep(0.001)
        if checkpoints(run_dir, complete=False):
            return ranks
        send(ranks, signal.SIGCONT)


def send(ranks: list[int], number: signal.Signals) -> None:
    for pid in ranks:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def state_of(pid: int) -> str:
    """State of a process as the kernel abbreviates it: T for stopped, Z for dead."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def kill(launcher: subprocess.Popen, run_dir: Path, victim: str, after: int, saving: bool) -> None:
    """Kill a victim after `after` more steps, with `saving` during the next save."""
    deadline, begin = time.monotonic() + HANG_S, steps_done(run_dir)
    while wait(steps_done(run_dir) != begin, launcher, deadline):  # metrics are truncated first
        time.sleep(0.01)
    begin = steps_done(run_dir)
    while wait(steps_done(run_dir) >= begin + after, launcher, deadline):
        time.sleep(0.005)
    ranks = stop_during_save(launcher, run_dir, deadline) if saving else ranks_of(launcher)
    assert len(ranks) == 2
    if victim == "all":
        os.killpg(launcher.pid, signal.SIGKILL)
    for pid in {"a rank": [random.choice(ranks)], "all": ranks, "the launcher": [launcher.pid]}[victim]:
        os.kill(pid, signal.SIGKILL)
    send(ranks, signal.SIGCONT)
    launcher.communicate(timeout=HANG_S)
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < deadline, "a rank is still alive"
        time.sleep(0.01)


def campaign(start: Starter, tmp_path: Path, kills: int, steps: int) -> int:
    """Kill and restart a run `kills` times, with victims in turn and every third time during a save.

    Returns:
        The number of interrupted saves.
    """
    random.seed(kills)
    data = write_latents(tmp_path / "latents")
    config = run_config(tmp_path, data, train__steps=steps, checkpoint__every=EVERY, model__hidden_size=128)
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config))
    whole = start(*torchrun(2, str(path), f"run.dir={tmp_path / 'whole'}", "checkpoint.every=0"))
    assert finish(whole)[0] == 0

    run_dir, cut = tmp_path / "run", 0
    for i in range(kills):
        before = max(checkpoints(run_dir, complete=True), default=0)
        launcher = start(*torchrun(2, str(path)))
        kill(launcher, run_dir, VICTIMS[i % 3], after=random.randint(1, steps // kills // 2), saving=i // 3 % 3 == 0)
        cut += bool(checkpoints(run_dir, complete=False))
        newest = max(checkpoints(run_dir, complete=True), default=0)
        assert newest >= before and newest >= steps_done(run_dir) - 2 * EVERY, "a checkpoint was lost"
    expected = max(checkpoints(run_dir, complete=True))
    code, output = finish(start(*torchrun(2, str(path))))
    assert code == 0, output
    assert int(re.search(r"step +(\d+)/", output)[1]) == expected + 1
    assert metrics(run_dir) == metrics(tmp_path / "whole")
    assert checkpoints(run_dir, complete=False) == []
    return cut


def test_resume_after_three_kills_is_bit_identical(start: Starter, tmp_path: Path) -> None:
    """Victims are a rank, all processes and the launcher, each during a save."""
    assert campaign(start, tmp_path, kills=3, steps=60) >= 1


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_resume_after_thirty_kills_is_bit_identical(start: Starter, tmp_path: Path) -> None:
    assert campaign(start, tmp_path, kills=30, steps=600) >= 8
