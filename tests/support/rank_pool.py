"""Real ranks for tests: processes forked from one that has imported torch, DeepSpeed and megatron-core.

A body is a module-level function. It runs on every rank of a world of the given size, under gloo on the loopback
interface, and its results are returned in rank order. The error of a failing rank is raised; ranks that hang, or wait
for one that failed, are killed. Every call has processes of its own, because libraries leave process groups and threads
behind, and a fork takes milliseconds.
"""

import contextlib
import multiprocessing
import os
import random
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from tests.support.limits import HANG_S

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
# All ranks share one GPU. NCCL refuses that within one host, so each rank claims another host.
ON_GPU = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
PRELOAD = ["rdm_scale.train", "rdm_scale.training.trainer", "rdm_scale.parallel.tensor"]
_GRACE_S = 10.0  # time in which the other ranks may notice that one failed
# Test ports: below those that the kernel gives to outgoing connections (32768 and up), any of which could take a port
# between the look here and its use.
_PORTS = range(20_000, 32_000)


class RankPool:
    def __init__(self, gpu: bool = False) -> None:
        """With `gpu` the ranks share the first GPU and communicate through NCCL."""
        self.gpu = gpu
        os.environ |= ENVIRONMENT | (ON_GPU if gpu else ON_CPU)  # before the server starts, from which ranks inherit
        # A process that has looked for GPUs cannot be forked into one that uses them.
        self.context: Any = multiprocessing.get_context("spawn" if gpu else "forkserver")
        if not gpu:
            self.context.set_forkserver_preload(PRELOAD)

    def run(self, world: int, body: Callable[..., Any], *arguments: Any, timeout_s: float = HANG_S) -> list[Any]:
        """Run `body(*arguments)` on `world` ranks; raises the error of the first failing rank."""
        port = free_port()
        workers = [self._start(self._names(rank, world, port), body, arguments) for rank in range(world)]
        try:
            return _collect([connection for _, connection in workers], timeout_s)
        finally:
            for process, connection in workers:
                process.kill()
                process.join()
                connection.close()

    def _names(self, rank: int, world: int, port: int) -> dict[str, str]:
        names = {"RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port, "LOCAL_RANK": 0 if self.gpu else rank}
        if self.gpu:
            names["NCCL_HOSTID"] = rank
        return {name: str(value) for name, value in names.items()}

    def _start(
        self, names: dict[str, str], body: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> tuple[multiprocessing.process.BaseProcess, Connection]:
        own, other = self.context.Pipe()
        process = self.context.Process(target=_work, args=(other, names, body, arguments), daemon=True)
        process.start()
        other.close()
        return process, own


class _Answer(NamedTuple):
    """Result of a rank, or its error, and the time of it, by a clock that all processes share."""

    result: Any
    error: BaseException | None
    at: float


def _collect(connections: list[Connection], timeout_s: float) -> list[Any]:
    results: list[Any] = [None] * len(connections)
    pending, deadline = set(range(len(connections))), time.monotonic() + timeout_s
    failed: list[_Answer] = []
    while pending:
        ready = wait([connections[rank] for rank in pending], max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for rank in sorted(pending):
            if connections[rank] in ready:
                pending.remove(rank)
                try:
                    answer: _Answer = connections[rank].recv()
                except EOFError:
                    answer = _Answer(None, RuntimeError(f"rank {rank} died"), time.monotonic())
                results[rank] = answer.result
                if answer.error is not None:
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
                    failed.append(answer)
    if failed:
        error = min(failed, key=lambda answer: answer.at).error
        assert error is not None
        raise error
    if pending:
        raise TimeoutError(f"ranks {sorted(pending)} of {len(connections)} did not answer within {timeout_s} s")
    return results


def free_port() -> int:
    """A port of the loopback interface that nothing uses, and that outgoing connections do not take."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _work(connection: Connection, names: dict[str, str], body: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= names
    try:
        answer = _Answer(body(*arguments), None, time.monotonic())
    except Exception as error:
        at = time.monotonic()
        error.add_note(f"on rank {names['RANK']} of {names['WORLD_SIZE']}:\n{traceback.format_exc()}")
        answer = _Answer(None, error, at)
    connection.send(answer)
    connection.close()
    os._exit(0)
