"""Reports of a step that hangs, in `run.dir/hangs`.

stacks_rank_00001.txt  stacks of all threads of a rank that has finished no step for `parallel.timeout_s`: those of
                       the rank that hangs, and of those that wait for it
collectives_rank_1     last collectives of a rank, which NCCL's watchdog writes before it ends a process whose
                       collective timed out; `torchfrtrace --prefix collectives_rank_ run.dir/hangs` compares them
"""

import faulthandler
import os
import warnings
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

FOLDER = "hangs"


def record_collectives(run_dir: Path) -> None:
    """Let NCCL record collectives (torch's flight recorder). Must precede the process groups.

    Variables that are set already stay as they are.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(run_dir / FOLDER / "collectives_rank_"))


class HangWatch:
    """Context in which a rank that makes no progress writes the stacks of all its threads.

    Args:
        timeout_s: time without a call of `progress`.
    """

    def __init__(self, run_dir: Path, rank: int, timeout_s: float) -> None:
        self._path, self._timeout_s = run_dir / FOLDER / f"stacks_rank_{rank:05d}.txt", timeout_s
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w")
        except OSError as error:  # reports are no reason to end a training
            warnings.warn(f"a step that hangs leaves no stacks in {self._path}: {error.strerror}", stacklevel=2)
        return self

    def progress(self) -> None:
        """Begin to wait anew. A thread without Python code waits: it works where this process is stuck for good."""
        if self._file is not None:
            faulthandler.dump_traceback_later(self._timeout_s, file=self._file)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._file is None:
            return
        written = os.fstat(self._file.fileno()).st_size
        self._file.close()
        if not written:
            self._path.unlink(missing_ok=True)
            with suppress(OSError):  # other ranks have reports there
                self._path.parent.rmdir()
