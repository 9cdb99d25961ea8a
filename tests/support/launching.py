"""Training started as users start it: as commands, under a launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support.limits import HANG_S

ENVIRONMENT = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


class Starter:
    """Starts commands, each in a process group of its own, and kills what is left of them at the end."""

    def __init__(self) -> None:
        self.started: list[subprocess.Popen] = []

    def __call__(self, *command: str, **environment: str) -> subprocess.Popen:
        self.started.append(
            subprocess.Popen(
                command,
                env=ENVIRONMENT | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
        return self.started[-1]

    def end(self) -> None:
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def finish(process: subprocess.Popen, timeout_s: float = HANG_S) -> tuple[int, str]:
    output, _ = process.communicate(timeout=timeout_s)
    return process.returncode, output


def wait_for_step(run_dir: Path, step: int, timeout_s: float = HANG_S) -> None:
    deadline = time.monotonic() + timeout_s
    path = run_dir / "metrics.jsonl"
    while time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= step:
            return
        time.sleep(0.05)
    raise TimeoutError(f"step {step} was not reached in {timeout_s} s")


def torchrun(ranks: int, *arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, "-m", "rdm_scale.train", *arguments]
