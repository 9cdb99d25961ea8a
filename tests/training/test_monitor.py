"""Files and messages of the monitor."""

import json
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rdm_scale.config import RunConfig
from rdm_scale.cost import model_flops
from rdm_scale.training.monitor import RunMonitor, metrics_record
from rdm_scale.training.rank_status import StepStatistics
from rdm_scale.training.step import StepResult
from rdm_scale.training.throughput import Throughput


def config_in(path: Path) -> RunConfig:
    tree = {"data": {"train": "x"}, "run": {"dir": str(path)}, "train": {"steps": 4}, "monitor": {"log_every": 2}}
    return RunConfig.model_validate(tree)


def record(step: int, **more: float) -> dict[str, float]:
    same = {"grad_norm": 0.5, "lr": 1e-3, "step_s": 0.5, "samples_per_s": 16.0, "tflops_per_rank": 247.1}
    return {"step": step, "loss": 1 / step, "samples": 8 * step} | same | more


def test_metrics_console_and_tensorboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = RunMonitor(config_in(tmp_path), 0)
    for step in (1, 2, 3):
        monitor.step(record(step))
    monitor.step(record(4))
    monitor.add(4, {"validation_loss": 0.125})
    monitor.image_grid(4, Image.new("RGB", (8, 6), "red"))
    monitor.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and lines[3]["validation_loss"] == 0.125
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed] == ["1/4", "2/4", "4/4", "4/4"]
    assert printed[2].endswith("  16 samples/s  left 0:00:00") and printed[3] == "step 4/4  validation 0.1250"
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4] and events.Scalars("loss")[3].value == 0.25
    assert events.Images("samples")[0].width == 8
    assert Image.open(tmp_path / "samples" / "step_00000004.png").size == (8, 6)


def test_the_console_shows_mfu_where_there_is_a_peak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = RunMonitor(config_in(tmp_path), 0)
    monitor.step(record(1, mfu=0.3147))
    monitor.close()
    assert "  16 samples/s  247 TFLOP/s a rank, MFU 31.5%  left " in capsys.readouterr().out


def test_a_resumed_run_appends_to_its_metrics(tmp_path: Path) -> None:
    first = RunMonitor(config_in(tmp_path), 0)
    first.step(record(1))
    first.close()
    second = RunMonitor(config_in(tmp_path), 1)
    second.step(record(2))
    second.close()
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


def test_keys_and_values_of_a_metrics_record(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    config = config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": 8})})
    statistics = StepStatistics(loss_sum=2.0, stop_requests=0.0, data_wait_s=0.1, lost_shards=0.0, saving=0.0)
    result = StepResult(3, 0.25, grad_norm=1.5, lr=1e-3, size=(1, 32, 32), seconds=0.4, statistics=statistics)
    tokens = 8 * config.model.tokens_of((1, 32, 32))
    assert metrics_record(config, result, Throughput(config, 2, None)) == {
        "step": 3,
        "loss": 0.25,
        "grad_norm": 1.5,
        "lr": 1e-3,
        "samples": 24,
        "step_s": 0.4,
        "tokens_per_s": tokens / 0.4,
        "data_wait_s": 0.1,
        "data_wait_share": 0.1 / 0.4,
        "samples_per_s": 8 / 0.4,
        "tflops_per_rank": 3 * model_flops(config.model) * 8 / 0.4 / 2 / 1e12,
    }
