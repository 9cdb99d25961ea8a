"""Rank, world size and meeting point of this process, from the environment that its launcher set."""

import os
import re
from collections.abc import MutableMapping

_PORTS = range(15_000, 30_000)  # below those that the kernel gives to outgoing connections


def adopt_slurm_task(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE and so on for a task of srun; nothing where a launcher has set them, or outside srun.

    The tasks meet on the first node of the job step, at a port made of the job's and the step's number: every task
    computes the same one, and two jobs that share a node mostly differ. MASTER_ADDR and MASTER_PORT win where set.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment or int(environment.get("SLURM_NTASKS", "1")) < 2:
        return
    if "SLURM_PROCID" not in environment or "SLURM_LOCALID" not in environment:
        return  # a process of the batch script itself, outside srun
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    here = int(environment.get("SLURM_NODEID", "0"))
    counts = _tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE") or environment["SLURM_TASKS_PER_NODE"])
    job, step = (environment.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["LOCAL_WORLD_SIZE"] = str(counts[here])
    environment.setdefault("MASTER_ADDR", first_host(nodes))
    environment.setdefault("MASTER_PORT", str(_PORTS[(int(job) * 31 + int(step)) % len(_PORTS)]))


def first_host(nodes: str) -> str:
    """First host of a Slurm node list: `gpu[07-09,12],login1` is `gpu07`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first.group() if first else nodes)


def _tasks_per_node(counts: str) -> list[int]:
    """Tasks of each node, from Slurm's short form: `8(x2),4` is 8, 8, 4."""
    tasks: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        tasks += [int(count)] * int(times or 1)
    return tasks
