"""Training as users start it: torchrun, deepspeed, signals, and one error message from many ranks."""

import signal
import sys
from pathlib import Path

import pytest

from rdm_scale.config import to_yaml
from tests.support.launching import Starter, finish, torchrun, wait_for_step
from tests.support.rank_pool import free_port
from tests.support.small_runs import metrics, run_config, write_latents


@pytest.fixture
def config(tmp_path: Path) -> str:
    data = write_latents(tmp_path / "latents")
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(run_config(tmp_path, data, train__steps=3)))
    return str(path)


def test_torchrun_script(start: Starter, config: str, tmp_path: Path) -> None:
    code, output = finish(start("launch/torchrun.sh", config, "train.steps=2", PROCESSES="2"))
    assert code == 0, output
    assert [r["step"] for r in metrics(tmp_path / "run")] == [1, 2]


def test_deepspeed_script(start: Starter, config: str, tmp_path: Path) -> None:
    port = str(free_port())
    code, output = finish(start("launch/deepspeed.sh", config, "train.steps=2", PROCESSES="2", MASTER_PORT=port))
    assert code == 0, output
    assert [r["step"] for r in metrics(tmp_path / "run")] == [1, 2]


def test_without_a_launcher(start: Starter, config: str, tmp_path: Path) -> None:
    code, output = finish(start(sys.executable, "-m", "rdm_scale.train", config))
    assert code == 0, output
    assert "step 1/3" in output and "saved" in output


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_after_a_checkpoint(
    start: Starter, config: str, tmp_path: Path, stop: signal.Signals
) -> None:
    """The signal goes to a single process, as a scheduler's warning or Ctrl-C in a terminal."""
    process = start(sys.executable, "-m", "rdm_scale.train", config, "train.steps=100000")
    wait_for_step(tmp_path / "run", 3)
    process.send_signal(stop)
    code, output = finish(process)
    assert code == 75, output
    done = len(metrics(tmp_path / "run"))
    assert f"stopped on request after step {done}" in output
    assert (tmp_path / "run" / "checkpoints" / f"step_{done:08d}" / "commit.json").exists()


def test_torchrun_stopped_by_a_signal_leaves_a_checkpoint(start: Starter, config: str, tmp_path: Path) -> None:
    process = start(*torchrun(2, config, "train.steps=100000"))
    wait_for_step(tmp_path / "run", 3)
    process.send_signal(signal.SIGTERM)
    _, output = finish(process)
    assert "stopped on request" in output, output


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "unknown key train.stepz: did you mean train.steps?"),
        ("train.global_batch_size=6", "train.global_batch_size=6 is not divisible by the 4 data-parallel ranks"),
        ("model.input.height=16", "data.train holds latents of shape [C, T, H, W] = [4, 1, 8, 8]"),
        ("data.train=nowhere", "there is no manifest"),
    ],
)
def test_four_ranks_report_an_error_once(
    start: Starter, config: str, tmp_path: Path, override: str, message: str
) -> None:
    code, output = finish(start(*torchrun(4, config, override)))
    assert code != 0
    assert output.count("error: ") == 1 and message in output, output
    assert 'File "' not in output.split("ChildFailedError")[0].split("torch/distributed/")[0]
    assert not (tmp_path / "run").exists()


def test_a_damaged_shard_stops_all_ranks_with_one_message(start: Starter, config: str, tmp_path: Path) -> None:
    shard = tmp_path / "latents" / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    code, output = finish(start(*torchrun(2, config, "train.steps=50")))
    assert code != 0
    assert output.count("error: ") == 1 and "shard-000001.tar" in output, output
