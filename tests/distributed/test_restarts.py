"""Restarts by torchrun: a killed rank is replaced, and what ended for good is not started again."""

import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from rdm_scale.config import to_yaml
from rdm_scale.run_status import read_status
from tests.support.launching import Starter, finish, torchrun, wait_for_step
from tests.support.small_runs import metrics, run_config, write_latents


@pytest.fixture
def config(tmp_path: Path) -> str:
    data = write_latents(tmp_path / "latents")
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(run_config(tmp_path, data, train__steps=300, checkpoint__every=10)))
    return str(path)


def restarting(ranks: int, *arguments: str, restarts: int = 2) -> list[str]:
    command = torchrun(ranks, *arguments)
    command.insert(4, f"--max-restarts={restarts}")
    return command


def rank_process(launcher: int, rank: int) -> psutil.Process:
    return next(child for child in psutil.Process(launcher).children() if child.environ().get("RANK") == str(rank))


@pytest.mark.parametrize("killed", [0, 1])
def test_bare_torchrun_recovers_from_a_killed_rank(start: Starter, config: str, tmp_path: Path, killed: int) -> None:
    """The run goes on from the last checkpoint, without any variable in the launcher's environment."""
    process = start(*restarting(2, config))
    wait_for_step(tmp_path / "run", 25)
    rank_process(process.pid, killed).kill()
    code, output = finish(process)
    assert code == 0, output
    steps = [record["step"] for record in metrics(tmp_path / "run")]
    assert steps == list(range(1, 301))
    assert "was lost in step " in output and "; starting again from step " in output, output
    assert read_status(tmp_path / "run")["state"] == "finished"


def test_a_run_that_was_stopped_is_not_started_again(start: Starter, config: str, tmp_path: Path) -> None:
    """A signal to the ranks: torchrun takes their exit code for a failure, and the next attempt ends at once."""
    process = start(*restarting(2, config, "train.steps=100000"))
    wait_for_step(tmp_path / "run", 3)
    rank_process(process.pid, 1).send_signal(signal.SIGUSR1)
    code, output = finish(process)
    done = len(metrics(tmp_path / "run"))
    assert code != 0 and f"stopped on request after step {done}" in output, output
    assert "nothing is started again" in output, output
    status = read_status(tmp_path / "run")
    assert (status["state"], status["exit_code"], status["step"], status["checkpoint"]) == ("stopped", 75, done, done)
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["step"] == done
    assert os.environ.get("TORCHELASTIC_RUN_ID") is None
