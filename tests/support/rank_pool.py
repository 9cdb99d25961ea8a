"""Real ranks for tests: processes forked from one that has imported torch, DeepSpeed and megatron-core.

A body is a module-level function. It runs on every rank of a world of the given size, under gloo on the loopback
interface, and its results are returned in rank order. The error of a failing rank is raised; ranks that hang, or wait
for one that failed, are killed. Every call has processes of its own, because libraries leave process groups and threads
behind, and a fork takes milliseconds.
"""

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
# All ranks share one GPU. NCCL refuses that within one host, so each rank claims another host.
ON_GPU = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
PRELOAD = ["rdm_scale.train", "rdm_scale.training.trainer", "rdm_scale.parallel.tensor"]
_GRACE_S = 10.0  # time in which the other ranks may notice that one failed


class RankPool:
    def __init__(self, gpu: bool = False) -> None:
        """With `gpu` the ranks share the first GPU and communicate through NCCL."""
        self.gpu = gpu
        os.environ |= ENVIRONMENT | (ON_GPU if gpu else ON_CPU)  # before the server starts, from which ranks inherit
        # A process that has looked for GPUs cannot be forked into one that uses them.
        self.context: Any = multiprocessing.get_context("spawn" if gpu else "forkserver")
        if not gpu:
            self.context.set_forkserver_preload(PRELOAD)

    def run(self, world: int, body: Callable[..., Any], *arguments: Any, timeout_s: float = 240) -> list[Any]:
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


def _collect(connections: list[Connection], timeout_s: float) -> list[Any]:
    results: list[Any] = [None] * len(connections)
    pending, deadline = set(range(len(connections))), time.monotonic() + timeout_s
    failure: BaseException | None = None
    while pending:
        ready = wait([connections[rank] for rank in pending], max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for rank in sorted(pending):
            if connections[rank] in ready:
                pending.remove(rank)
                try:
                    results[rank], error = connections[rank].recv()
                except EOFError:
                    error = RuntimeError(f"rank {rank} died")
                if error is not None and failure is None:
                    failure, deadline = error, min(deadline, time.monotonic() + _GRACE_S)
    if failure is not None:
        raise failure
    if pending:
        raise TimeoutError(f"ranks {sorted(pending)} of {len(connections)} did not answer within {timeout_s} s")
    return results


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _work(connection: Connection, names: dict[str, str], body: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= names
    try:
        answer = (body(*arguments), None)
    except Exception as error:
        error.add_note(f"on rank {names['RANK']} of {names['WORLD_SIZE']}:\n{traceback.format_exc()}")
        answer = (None, error)
    connection.send(answer)
    connection.close()
    os._exit(0)
