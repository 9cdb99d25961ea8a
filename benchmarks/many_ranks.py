"""Bookkeeping whose cost grows with the number of ranks: 64, 512 and 4,096 of them, simulated in one process.

    OMP_NUM_THREADS=1 python benchmarks/many_ranks.py [--ranks 64 512 4096]

    groups   making the mesh's process groups on rank 0 (tensor 2, pipeline 2), without a network: the number of groups,
             those that rank 0 is in, and the time
    hosts    the table of hosts (8 ranks each) that rank 0 makes of what ranks say, and its size as every rank reads it
    commit   rank 0's thread joins the records of all ranks' files to the commit of a checkpoint, beside training; and
             its size
    resume   every rank parses the commit and its checksum, after rank 0 has read it for all
    before   unpickling the records of all ranks, as every rank did within a step until the records went to rank 0 only

The functions are those of the package, with the records of ranks of a model of 28 blocks. Prints Markdown, writes
benchmarks/results/many_ranks.json.
"""

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks.report import print_table, write_results

TENSOR = PIPELINE = 2
RANKS_PER_HOST = 8
SPANS = 8  # coverage bounds of a rank's file


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def groups(ranks: int) -> dict[str, float]:
    """Process groups of rank 0 with the backend `fake`, in a process of its own (they cannot be made twice)."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from rdm_scale.parallel.megatron_adapter import initialize_axes

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    made: list[list[int]] = []
    new_group = dist.new_group

    def counted(ranks: list[int] | None = None, *arguments: Any, **more: Any) -> Any:
        made.append(ranks or [])
        return new_group(ranks, *arguments, **more)

    dist.new_group = distributed_c10d.new_group = counted
    seconds, _ = timed(lambda: initialize_axes(TENSOR, PIPELINE, timedelta(seconds=600)))
    return {"groups": len(made), "member": sum(not each or 0 in each for each in made), "seconds": seconds}


def records(rank: int) -> list[Any]:
    from rdm_scale.checkpoint.format.coverage import CoverageBounds
    from rdm_scale.checkpoint.format.index import FileRecord

    block = rank % 28
    names = (f"blocks.{block}.attention.projection.weight", f"blocks.{block}.mlp.projection.weight")
    spans = tuple(CoverageBounds(first=names[0], last=names[1], low=i / 64, high=(i + 1) / 64) for i in range(SPANS))
    data = FileRecord(name=f"rank_{rank:05d}.safetensors", bytes=10**9)
    return [data, FileRecord(name=f"rank_{rank:05d}.index.safetensors", bytes=10**5, xxh3="0" * 16, spans=spans)]


def bookkeeping(ranks: int) -> dict[str, float]:
    """Seconds and bytes of the other rows."""
    from rdm_scale.checkpoint.directory import COMMIT, CheckpointDirectory, is_checkpoint
    from rdm_scale.parallel.hosts import Hosts
    from rdm_scale.storage.location import Location

    names = [f"node-{rank // RANKS_PER_HOST:04d}" for rank in range(ranks)]
    hosts_s, table = timed(lambda: Hosts.of(names).to_json())
    everyone = [records(rank) for rank in range(ranks)]
    encoded = [record.model_dump_json().encode() for own in everyone for record in own]
    pickled = [pickle.dumps(own) for own in everyone]
    before_s, _ = timed(lambda: [pickle.loads(each) for each in pickled])
    with tempfile.TemporaryDirectory() as folder:
        directory = CheckpointDirectory(Location(folder))
        directory.begin(1)
        state: Any = {"step": 1}
        commit_s, _ = timed(lambda: directory.commit(1, state, encoded))
        size = (Path(folder) / "step_00000001" / COMMIT).stat().st_size
        resume_s, complete = timed(lambda: is_checkpoint(directory.folder(1)))
        assert complete
    return {
        "hosts_s": hosts_s, "hosts_bytes": len(table), "commit_s": commit_s, "commit_bytes": size, "resume_s": resume_s,
        "before_s": before_s,
    }  # fmt: skip


def measure(ranks: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.many_ranks", "--groups-of", str(ranks)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"DS_ACCELERATOR": "cpu"}
    )
    made = json.loads(done.stdout.splitlines()[-1])
    return {"ranks": ranks, **{f"groups_{name}": value for name, value in made.items()}, **bookkeeping(ranks)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 512, 4096])
    parser.add_argument("--groups-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.groups_of:
        print(json.dumps(groups(arguments.groups_of)))
        return
    rows = [measure(ranks) for ranks in arguments.ranks]
    print_table(
        ["ranks", "groups", "of rank 0", "making them", "table of hosts", "commit", "reading it", "before"],
        [
            (
                f"{row['ranks']:,}",
                row["groups_groups"],
                row["groups_member"],
                f"{row['groups_seconds']:.2f} s",
                f"{row['hosts_s'] * 1000:.1f} ms, {row['hosts_bytes'] / 1000:.1f} kB",
                f"{row['commit_s']:.2f} s, {row['commit_bytes'] / 1e6:.1f} MB",
                f"{row['resume_s']:.2f} s",
                f"{row['before_s']:.2f} s",
            )
            for row in rows
        ],
    )
    write_results(__file__, {"rows": rows})


if __name__ == "__main__":
    main()
