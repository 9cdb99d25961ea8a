"""Requests to stop that come during long work beside the steps, and mistakes of a launch."""

import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from rdm_scale.config import to_yaml
from rdm_scale.run_status import read_status
from tests.support.launching import Starter, finish, torchrun, wait_for_step
from tests.support.limits import HANG_S
from tests.support.rank_pool import free_port
from tests.support.small_runs import metrics, run_config, write_latents

TRAIN = (sys.executable, "-m", "rdm_scale.train")


@pytest.fixture
def config(tmp_path: Path) -> str:
    data = write_latents(tmp_path / "latents")
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(run_config(tmp_path, data, train__steps=1000)))
    return str(path)


def test_a_request_ends_the_drawing_of_samples(start: Starter, config: str, tmp_path: Path) -> None:
    """A grid that would take hours is left, and the step before it is saved."""
    process = start(*torchrun(2, config, "monitor.sample_every=4", "sampling.steps=10000000"))
    wait_for_step(tmp_path / "run", 4)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, output = finish(process)
    assert "stopped on request after step 4" in output, output
    assert len(metrics(tmp_path / "run")) == 4
    assert (tmp_path / "run/checkpoints/step_00000004/commit.json").exists()


def test_a_save_precedes_the_drawing_of_samples(start: Starter, config: str, tmp_path: Path) -> None:
    process = start(*TRAIN, config, "monitor.sample_every=4", "sampling.steps=10000000", "checkpoint.every=4")
    commit, deadline = tmp_path / "run/checkpoints/step_00000004", time.monotonic() + HANG_S
    while not any(commit.glob("rank_*.safetensors")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.kill()


def test_a_request_during_the_start_up(start: Starter, config: str, tmp_path: Path) -> None:
    """While the rank waits for another one that never comes."""
    port = str(free_port())
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    process = start(*TRAIN, config, **variables)
    deadline = time.monotonic() + HANG_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", int(port))) == 0:
                break
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 75 and "Traceback" not in output, output
    assert read_status(tmp_path / "run") == {}


def test_a_taken_port(start: Starter, config: str) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        code, output = finish(start(*TRAIN, config, MASTER_PORT=str(taken.getsockname()[1])))
    assert code == 1 and "Traceback" not in output, output
    assert "cannot listen on MASTER_PORT=" in output and "set MASTER_PORT to a free one" in output


def test_an_unknown_host(start: Starter, config: str) -> None:
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}
    process = start(*TRAIN, config, "parallel.start_timeout_s=3", MASTER_ADDR="nowhere.invalid", **variables)
    code, output = finish(process)
    assert code == 1 and output.count("error: ") == 1 and "Traceback" not in output, output
    assert "the host nowhere.invalid is unknown here: check MASTER_ADDR" in output


def test_a_missing_rank_is_named(start: Starter, config: str) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_PORT": str(free_port())}
    code, output = finish(start(*TRAIN, config, "parallel.start_timeout_s=3", **variables))
    assert code == 1 and "ranks 1-3 of 4 did not come within 3 s" in output and "Traceback" not in output, output
    assert f"there are {socket.gethostname()} (rank 0)" in output


def test_tasks_of_srun_are_ranks(start: Starter, config: str, tmp_path: Path) -> None:
    """Each task of srun used to be a run of its own."""
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NODEID": "0"}
    slurm |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2", "MASTER_PORT": str(free_port())}
    tasks = [
        start(*TRAIN, config, "train.steps=2", **slurm, SLURM_PROCID=str(task), SLURM_LOCALID=str(task))
        for task in (0, 1)
    ]
    ended = [finish(task) for task in tasks]
    assert [code for code, _ in ended] == [0, 0], ended
    assert "data 2" in ended[0][1] and len(metrics(tmp_path / "run")) == 2, ended


def test_tensorboard_that_is_missing_is_one_line(start: Starter, config: str) -> None:
    script = "import sys; sys.modules['tensorboard'] = None; from rdm_scale.train import main; main()"
    code, output = finish(start(sys.executable, "-c", script, config, "monitor.tensorboard=true", "train.steps=1"))
    assert code == 2 and "Traceback" not in output, output
    assert "error: monitor.tensorboard=true needs the package tensorboard" in output
