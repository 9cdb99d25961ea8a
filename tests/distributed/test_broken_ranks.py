"""A rank that raises, dies or hangs in the middle of a pipelined step: the others exit, and one of them reports."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rdm_scale.config import to_yaml
from tests.support.limits import HANG_S
from tests.support.rank_pool import free_port
from tests.support.small_runs import run_config, write_latents

RANKS, FAULTY = 4, 1
SCRIPT = f"""
import os, time
from rdm_scale.training.trainer import Trainer
train_step = Trainer.train_step
def faulty_inputs(batch):
    {{fault}}
def faulty_step(self, batches):
    if self.step == 3 and self.mesh.rank == {FAULTY}:
        self.objective.model_inputs = faulty_inputs
    return train_step(self, batches)
Trainer.train_step = faulty_step
from rdm_scale.train import main
main()
"""


def start(config: Path, fault: str) -> list[subprocess.Popen]:
    """Start the ranks of one node as a launcher does, but without its reaction to a failed rank."""
    common = {"WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": 1}
    return [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT.format(fault=fault), str(config)],
            env=os.environ | {k: str(v) for k, v in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in range(RANKS)
    ]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raise ArithmeticError('of this rank')", "ArithmeticError: of this rank"),
        ("os.kill(os.getpid(), 9)", "(rank 1) was lost in step "),
        ("time.sleep(1000)", "imed out"),
    ],
    ids=["raises", "dies", "hangs"],
)
def test_all_ranks_exit_and_one_reports(tmp_path: Path, fault: str, words: str) -> None:
    # Only a rank that hangs is noticed by the timeout: the others must end long before theirs.
    timeout_s = 45 if "sleep" in fault else 10 * HANG_S
    config = run_config(
        tmp_path,
        write_latents(tmp_path / "latents"),
        parallel__pipeline=2,
        parallel__timeout_s=timeout_s,
        train__micro_batch_size=1,
    )
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    processes = start(tmp_path / "run.yaml", fault)
    try:
        wait_for_steps(Path(config.run.dir) / "metrics.jsonl", 2)
        others = [p for rank, p in enumerate(processes) if rank != FAULTY]
        deadline = time.monotonic() + HANG_S
        errors = [p.communicate(timeout=max(1, deadline - time.monotonic()))[1] for p in others]
        assert all(p.returncode == 1 for p in others)
        if "sleep" not in fault:
            errors.append(processes[FAULTY].communicate(timeout=HANG_S)[1])
        reports = [text for text in errors if "failed in step" in text or "error:" in text]
        assert len(reports) == 1 and words in reports[0], errors
        stacks = sorted((Path(config.run.dir) / "hangs").glob("stacks_rank_*.txt"))
        if "sleep" in fault:  # in the stacks stands what each rank was at
            assert len(stacks) == RANKS
            assert ["faulty_inputs" in path.read_text() for path in stacks] == [rank == FAULTY for rank in range(RANKS)]
        else:
            assert not any(path.stat().st_size for path in stacks)  # a killed rank leaves its empty file
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for_steps(metrics: Path, steps: int) -> None:
    deadline = time.monotonic() + HANG_S
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= steps):
        assert time.monotonic() < deadline, f"the run has not reached step {steps}"
        time.sleep(0.1)
