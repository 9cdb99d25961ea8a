"""Processes that run a tool as if from a shell, forked from one that has imported what takes seconds."""

import multiprocessing
import os
import runpy
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tests.support.limits import HANG_S

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "pytest",
        "torch",
        "diffusers.models.autoencoders.autoencoder_kl",
        "rdm_scale.encoding.runner",
        "rdm_scale.encoding.inspection",
        "rdm_scale.sampling.image_grid",
    ]
)


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


class Running:
    """A call of a tool that is under way, as one of `size` ranks."""

    def __init__(self, tmp: Path, tool: Path, arguments: tuple[object, ...], rank: int = 0, size: int = 1) -> None:
        self._out = tmp / f"streams-{time.monotonic_ns()}-{rank}"
        self._out.mkdir(parents=True)
        for name in ("stdout", "stderr"):  # here: it may be killed before it gets to it
            (self._out / name).touch()
        environment = {"OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(size)}
        command = [str(tool), *map(str, arguments)]
        self.process = FORKS.Process(target=_main, args=(command, environment, self._out))
        self.process.start()

    def result(self) -> Result:
        self.process.join(HANG_S)
        assert self.process.exitcode is not None, "it does not end"
        return Result(self.process.exitcode, *((self._out / name).read_text() for name in ("stdout", "stderr")))


def _main(command: list[str], environment: dict[str, str], out: Path) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(out / name, os.O_WRONLY), number)
    os.environ.update(environment)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
