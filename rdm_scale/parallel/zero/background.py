"""Collectives in the background: on a stream of their own on GPUs, in a thread of their own on CPUs."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

Wait = Callable[[], None]


class Background:
    """Runs jobs one after the other beside what the caller goes on to do.

    All ranks of a process group must start the same jobs in the same order, and use the group for nothing else until
    they have waited for them.

    Args:
        enabled: otherwise a job runs at once.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self._stream = torch.cuda.Stream(device) if enabled and device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1) if enabled and device.type != "cuda" else None

    def start(self, job: Callable[[], None]) -> Wait:
        """Start a job that uses what has been computed so far; returns a function that waits for its end.

        On GPUs that function makes the current stream wait, not the host. It raises the error of the job.
        """
        if self._thread is not None:
            future: Future[None] = self._thread.submit(job)
            return future.result
        if self._stream is None:
            job()
            return _nothing
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            job()
            done = self._stream.record_event()
        return done.wait


def _nothing() -> None:
    pass
