"""Execution of a sweep: each run a process of its own, finished runs are not repeated, killed ones are resumed."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from rdm_scale.errors import RdmError
from rdm_scale.progress import ProgressReporter
from rdm_scale.scaling.observations import Observations
from rdm_scale.scaling.sweep import Sweep, SweepRun

METRICS, LOG = "metrics.jsonl", "log.txt"
State = Literal["waiting", "unfinished", "finished", "diverged"]


@dataclass(frozen=True)
class RunState:
    """State of a sweep's run, as its directory says.

    Attributes:
        step: steps done.
        loss: validation loss of the last step (training loss if there is no validation data); NaN before the end.
        training_loss: mean training loss of the last tenth of the steps.
        step_s: median duration of a step.
    """

    run: SweepRun
    state: State
    step: int = 0
    loss: float = math.nan
    training_loss: float = math.nan
    step_s: float = math.nan


def run_state(folder: Path, run: SweepRun) -> RunState:
    """State of a run below the sweep's folder."""
    records = _records(folder / "runs" / run.name / METRICS)
    if not records:
        return RunState(run, "waiting")
    last = records[-1]
    tail = [float(record["loss"]) for record in records[-max(1, len(records) // 10) :]]
    step, training_loss = int(last["step"]), float(np.mean(tail))
    step_s = float(np.median([float(record["step_s"]) for record in records]))
    loss = float(last.get("validation_loss", training_loss))
    if not all(math.isfinite(float(record["loss"])) for record in records) or not math.isfinite(loss):
        return RunState(run, "diverged", step, loss, training_loss, step_s)
    if step < run.steps:
        diverged = "NonFinite" in _tail(folder / "runs" / run.name / LOG) or "is not finite" in _tail(
            folder / "runs" / run.name / LOG
        )
        return RunState(run, "diverged" if diverged else "unfinished", step, math.nan, training_loss, step_s)
    first = float(np.mean([float(record["loss"]) for record in records[: max(1, len(records) // 20)]]))
    state: State = "diverged" if loss > first else "finished"  # it never learned, or unlearned what it had
    return RunState(run, state, step, loss, training_loss, step_s)


def _records(file: Path) -> list[dict[str, float]]:
    if not file.exists():
        return []
    records = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the last line of a killed run; the run repeats the step
        if isinstance(record, dict) and {"step", "loss", "step_s"} <= record.keys():
            records.append(record)
    return records


def _tail(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")[-4000:] if file.exists() else ""


def sweep_states(folder: Path, sweep: Sweep) -> list[RunState]:
    return [run_state(folder, run) for run in sweep.runs]


def observed(states: Sequence[RunState]) -> Observations:
    """Finished runs as observations."""
    done = [state for state in states if state.state == "finished"]
    columns = {
        "parameters": [state.run.parameters for state in done],
        "samples": [state.run.samples for state in done],
        "loss": [state.loss for state in done],
        "flops": [state.run.flops for state in done],
        "seed": [state.run.seed for state in done],
        "depth": [state.run.depth for state in done],
    }
    return Observations(**{name: np.array(values, np.float64) for name, values in columns.items()})


def execute(folder: Path, sweep: Sweep, runs: Sequence[SweepRun], workers: int) -> list[RunState]:
    """Train those of `runs` that are not finished, the longest first; returns their states.

    Every run has one thread and no GPU but those that CUDA_VISIBLE_DEVICES leaves it.

    Raises:
        RdmError: a run failed for another reason than divergence; the others have been finished.
    """
    waiting = [run for run in runs if run_state(folder, run).state in ("waiting", "unfinished")]
    waiting.sort(key=lambda run: -run.flops)
    total = sum(run.flops for run in runs)
    done = total - sum(run.flops for run in waiting)
    failures: list[str] = []
    running: dict[str, tuple[SweepRun, subprocess.Popen[bytes]]] = {}
    with ProgressReporter("sweep", round(total), "FLOP", initial=round(done), scaled=True) as progress:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    run = waiting.pop(0)
                    running[run.name] = run, _start(folder, sweep, run)
                time.sleep(0.2)
                for name, (run, process) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[name]
                    progress.update(round(run.flops), run=name)
                    if run_state(folder, run).state not in ("finished", "diverged"):
                        failures.append(f"{name} ended with code {process.returncode}: {_last_line(folder, run)}")
        finally:
            for _, process in running.values():
                process.terminate()
    if failures:
        raise RdmError("\n  ".join(["runs of the sweep failed (finished ones are kept):", *failures]))
    return [run_state(folder, run) for run in runs]


def _start(folder: Path, sweep: Sweep, run: SweepRun) -> "subprocess.Popen[bytes]":
    directory = folder / "runs" / run.name
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "rdm_scale.train", sweep.config, *sweep.run_overrides(run, folder)]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with (directory / LOG).open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _last_line(folder: Path, run: SweepRun) -> str:
    lines = _tail(folder / "runs" / run.name / LOG).strip().splitlines()
    return f"{lines[-1] if lines else 'nothing was printed'} ({folder / 'runs' / run.name / LOG})"
