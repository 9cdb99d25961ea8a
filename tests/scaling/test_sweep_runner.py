"""States of a sweep's runs, and a real sweep that is killed and goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from rdm_scale.config import to_yaml
from rdm_scale.scaling.guards import unused_runs
from rdm_scale.scaling.sweep import Sweep, SweepRun, read_sweep
from rdm_scale.scaling.sweep_runner import observed, run_state, sweep_states
from tests.support.limits import HANG_S
from tests.support.small_runs import run_config, write_latents

RUN = SweepRun("one", (), 1000, 640, 6e6, 2, 32, 10, 0)


def write_metrics(folder: Path, losses: list[float], validation: float | None = None, log: str = "") -> None:
    run = folder / "runs" / "one"
    run.mkdir(parents=True, exist_ok=True)
    records = [{"step": n + 1, "loss": loss, "step_s": 0.5} for n, loss in enumerate(losses)]
    if validation is not None:
        records[-1]["validation_loss"] = validation
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "log.txt").write_text(log)


def test_states(tmp_path: Path) -> None:
    assert run_state(tmp_path, RUN).state == "waiting"
    write_metrics(tmp_path, [3.0, 2.0, 1.0])
    found = run_state(tmp_path, RUN)
    assert (found.state, found.step, found.step_s) == ("unfinished", 3, 0.5)
    write_metrics(tmp_path, [3.0] * 5 + [1.0] * 5, validation=1.25)
    found = run_state(tmp_path, RUN)
    assert (found.state, found.loss, found.training_loss) == ("finished", 1.25, 1.0)
    write_metrics(tmp_path, [3.0] * 5 + [9.0] * 5, validation=9.0)
    assert run_state(tmp_path, RUN).state == "diverged"
    write_metrics(tmp_path, [3.0, 2.0], log="error: the loss of step 3 is not finite (nan)")
    assert run_state(tmp_path, RUN).state == "diverged"


def test_runs_in_no_fit_are_named(tmp_path: Path) -> None:
    write_metrics(tmp_path, [3.0, 2.0])
    sweep = Sweep("config.yaml", (), "depth", (RUN, SweepRun("two", (), 2000, 640, 1e7, 4, 32, 10, 0)))
    states = sweep_states(tmp_path, sweep)
    assert unused_runs(states) == ["one is not finished (step 2 of 10)", "two was not started"]
    assert len(observed(states)) == 0


@pytest.mark.processes
def test_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    """Real runs of two sizes; the command is killed after the first has ended, and does not repeat it."""
    manifest = write_latents(tmp_path / "latents")
    config = run_config(tmp_path, manifest, model__base_depth=2)
    (tmp_path / "base.yaml").write_text(to_yaml(config))
    tool = [sys.executable, str(Path("tools/scaling.py").resolve())]
    plan = [*tool, "plan", str(tmp_path / "base.yaml"), f"data.validation={manifest}", "--budget", "1e10"]
    plan += ["--sizes", "2", "--lengths", "12", "-o", str(tmp_path / "sweep.yaml")]
    planned = subprocess.run(plan, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert planned.returncode == 0, planned.stderr
    sweep = read_sweep(tmp_path / "sweep.yaml")
    assert len(sweep.runs) == 2

    command = [*tool, "run", str(tmp_path / "sweep.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True) as first:
        ends = time.monotonic() + HANG_S
        largest = max(sweep.runs, key=lambda run: run.flops)
        while run_state(tmp_path, largest).state != "finished" and time.monotonic() < ends and first.poll() is None:
            time.sleep(0.1)
        os.killpg(first.pid, signal.SIGKILL)
    assert run_state(tmp_path, largest).state == "finished"
    written = (tmp_path / "runs" / largest.name / "metrics.jsonl").stat().st_mtime_ns
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / largest.name / "metrics.jsonl").stat().st_mtime_ns == written
    observations = observed(sweep_states(tmp_path, sweep))
    assert len(observations) == 2 and np.isfinite(observations.loss).all()
    assert yaml.safe_load((tmp_path / "sweep.yaml").read_text())["axis"] == "depth"
