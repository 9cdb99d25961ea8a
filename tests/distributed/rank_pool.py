"""Real ranks for tests: processes that import torch and DeepSpeed once and then form one world after another.

A body is a module-level function; it runs on every rank of a world of the size asked for, under gloo on the loopback
interface, and its results come back in rank order. When a rank fails its error is raised; when one hangs, or others
wait for one that failed, the pool's processes are ended and started anew for the next test.
"""

import contextlib
import gc
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

_GRACE_S = 10.0  # what the others may take to notice that a rank failed


class RankPool:
    def __init__(self, size: int) -> None:
        self.size = size
        self.workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def run(self, world: int, body: Callable[..., Any], *arguments: Any, timeout_s: float = 240) -> list[Any]:
        """`body(*arguments)` on `world` ranks. Raises what the first failing rank raised, with its type."""
        self._start(world)
        port = _free_port()
        for rank in range(world):
            self.workers[rank][1].send((rank, world, port, body, arguments))
        results: list[Any] = [None] * world
        pending, deadline = set(range(world)), time.monotonic() + timeout_s
        failure: BaseException | None = None
        died = False
        while pending:
            ready = wait([self.workers[rank][1] for rank in pending], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in sorted(pending):
                if self.workers[rank][1] in ready:
                    pending.remove(rank)
                    try:
                        results[rank], error = self.workers[rank][1].recv()
                    except EOFError:
                        error, died = RuntimeError(f"rank {rank} died"), True
                    if error is not None and failure is None:
                        failure, deadline = error, min(deadline, time.monotonic() + _GRACE_S)
        if pending or died:
            self.close()
        if failure is not None:
            raise failure
        if pending:
            raise TimeoutError(f"ranks {sorted(pending)} of {world} did not answer within {timeout_s} s")
        return results

    def close(self) -> None:
        for process, connection in self.workers:
            process.kill()
            process.join()
            connection.close()
        self.workers = []

    def _start(self, world: int) -> None:
        context = multiprocessing.get_context("spawn")
        while len(self.workers) < world:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _work(connection: Connection) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):
        while True:
            rank, world, port, body, arguments = connection.recv()
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_PORT": str(port),
            }
            try:
                answer = (body(*arguments), None)
            except Exception as error:
                error.add_note(f"on rank {rank} of {world}:\n{traceback.format_exc()}")
                answer = (None, error)
            _forget_world()
            connection.send(answer)


def _forget_world() -> None:
    """Brings the libraries back to where no world has been met."""
    import deepspeed
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    torch.use_deterministic_algorithms(False)
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    gc.collect()
