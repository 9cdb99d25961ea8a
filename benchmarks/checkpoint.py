"""Bandwidth of checkpoints, the stall of training during a save, and the time to plan a load with another layout.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py [--rounds 5] [--dir /tmp] [--only bandwidth|stall|planning]

    bandwidth  one rank saves and loads weights, optimizer state and EMA weights of a few large and of many small
               tensors, alternating with a plain file of the same bytes without structure or checksums. Every save ends
               with fsync. Loads are measured after the files' pages are dropped from the cache, and from the cache
    stall      how long training waits for an asynchronous save, how long the save takes in total, and its memory
    planning   how long one rank takes to plan its reads from a checkpoint that as many ranks of another layout wrote:
               indices only, no data. A model of 1,000 blocks, tensor x pipeline x data ranks

Prints Markdown, writes benchmarks/results/checkpoint.json.
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.checkpoint_storage import STATE_ENTRIES, shapes_of
from benchmarks.memory import forget_peak, peak_since, rss
from benchmarks.plain_file import load_plain, save_plain
from benchmarks.report import print_table, read_results, write_results
from rdm_scale.checkpoint.directory import CheckpointDirectory, open_checkpoint
from rdm_scale.checkpoint.format.coverage import coverage_bounds
from rdm_scale.checkpoint.format.index import DATA, INDEX, FileRecord, blocks_in, digest, encode_index
from rdm_scale.checkpoint.format.slices import SliceTable
from rdm_scale.checkpoint.format.writer import write_tensors
from rdm_scale.checkpoint.saver import Saver
from rdm_scale.checkpoint.sharded_state import slice_table
from rdm_scale.config.schema import CheckpointConfig
from rdm_scale.models.layers import UNSHARDED, Slice
from rdm_scale.parallel.parallel_model import ShardedState
from rdm_scale.parallel.zero.engine import ParameterRange
from rdm_scale.storage.location import Location

SETS = {"30 large tensors": {f"w{i}": (1440, 1536) for i in range(30)}, "56,000 small tensors": shapes_of(1000, 36)}
BLOCKS, WIDTH = 1000, 1024  # of the planned model: 15 billion parameters


def shards_of(shapes: dict[str, tuple[int, ...]]) -> list[ParameterRange]:
    """Parameter ranges of a single rank, which holds all of every tensor."""
    shards, start = [], 0
    for name, shape in shapes.items():
        shards.append(ParameterRange(name, shape, 0, math.prod(shape), start, UNSHARDED))
        start += math.prod(shape)
    return shards


def forget_pages(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def save_ours(folder: Path, flats: dict[str, Tensor], table: SliceTable) -> None:
    directory = CheckpointDirectory(Location(folder))
    directory.commit(1, {"step": 1}, write_tensors(directory.begin(1), 0, table, flats))


def plan_ours(folder: Path, table: SliceTable) -> None:
    """Open a checkpoint and plan its reads, without reading a tensor."""
    _, reader = open_checkpoint(CheckpointDirectory(Location(folder)).folder(1), table)
    reader.plan(table)


def load_ours(folder: Path, flats: dict[str, Tensor], table: SliceTable) -> None:
    _, reader = open_checkpoint(CheckpointDirectory(Location(folder)).folder(1), table)
    for entry, flat in flats.items():
        reader.fill(table, entry, flat)


def bandwidth(name: str, rounds: int, where: str | None) -> dict[str, Any]:
    shards = shards_of(SETS[name])
    elements = sum(shard.numel for shard in shards)
    flats = {entry: torch.randn(elements) for entry in STATE_ENTRIES}
    loaded = {entry: torch.zeros(elements) for entry in STATE_ENTRIES}
    size = 4 * elements * len(STATE_ENTRIES)
    ways = {"plain": (save_plain, load_plain, ()), "ours": (save_ours, load_ours, (slice_table(shards),))}
    rates: dict[str, list[float]] = {}
    plans: list[float] = []
    for _ in range(rounds):
        for way, (save, load, more) in ways.items():
            with tempfile.TemporaryDirectory(dir=where) as temporary:
                folder = Path(temporary)
                rates.setdefault(f"{way} save", []).append(size / timed(save, folder, flats, *more))
                for state in ("cold", "cached"):
                    if state == "cold":
                        forget_pages(folder)
                    rates.setdefault(f"{way} load {state}", []).append(size / timed(load, folder, loaded, *more))
                    if not all(torch.equal(loaded[entry], flats[entry]) for entry in STATE_ENTRIES):
                        raise SystemExit(f"{way} did not give back what was saved")
                    for flat in loaded.values():
                        flat.zero_()
                if way == "ours":
                    plans.append(timed(plan_ours, folder, *more))
                on_disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"\n{name}, {size / 1e6:,.0f} MB, on disk {on_disk / size:.4f} of that")
    shares, rows = {}, []
    for what in ("save", "load cold", "load cached"):
        pairs = zip(rates[f"ours {what}"], rates[f"plain {what}"], strict=True)
        shares[what] = statistics.median(mine / plain for mine, plain in pairs)
        plain, ours = (statistics.median(rates[f"{way} {what}"]) / 1e6 for way in ways)
        rows.append((what, f"{plain:,.0f}", f"{ours:,.0f}", f"{shares[what]:.2f}"))
    print_table(("", "plain file (MB/s)", "ours (MB/s)", "ours / plain, median of rounds"), rows)
    plan_s = statistics.median(plans)
    print(f"\nopening and planning: {plan_s * 1e3:.1f} ms of a load, {plan_s / len(shards) * 1e6:.2f} us a parameter")
    return {"bytes": size, "on_disk": on_disk, "rates": rates, "shares": shares, "plan_s": plans}


def timed(work: Any, *arguments: Any) -> float:
    begin = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - begin


class OneRank:
    """Substitute for a parallel model and a mesh, with what saving needs of them."""

    rank, world_size, is_first, device = 0, 1, True, torch.device("cpu")

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.owned_ranges = shards_of(shapes)
        self.elements = sum(one.numel for one in self.owned_ranges)
        self.buffers = ShardedState(*([torch.randn(self.elements)] for _ in ShardedState._fields))

    def state(self) -> ShardedState:
        return self.buffers

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def gather_rare(self, value: Any) -> dict[int, Any]:
        return {} if value is None else {0: value}

    def own_store(self) -> dist.HashStore:
        return dist.HashStore()


def stall(name: str, rounds: int, where: str | None) -> dict[str, Any]:
    rank = OneRank(SETS[name])
    size = 16 * rank.elements
    stalls, totals = [], []
    with tempfile.TemporaryDirectory(dir=where) as folder:
        saver = Saver(CheckpointDirectory(Location(folder)), CheckpointConfig(keep=1), rank, rank, lambda line: None)  # type: ignore[arg-type]
        forget_peak()
        before = rss()
        for step in range(1, rounds + 2):  # the first save also makes the memory for its copy
            begin = time.perf_counter()
            saver.start({"step": step})
            stalls.append(saver.stall_s)
            saver.finish()
            totals.append(time.perf_counter() - begin)
        peak = peak_since(before)
    found = {
        "bytes": size,
        "first_stall_s": stalls[0],
        "stall_s": statistics.median(stalls[1:]),
        "save_s": statistics.median(totals[1:]),
        "peak_bytes": peak,
    }
    print(
        f"\n{name}: training waits {found['stall_s']:.3f} s (the first time {found['first_stall_s']:.3f} s) of the "
        f"{found['save_s']:.2f} s that a save takes: {found['stall_s'] / found['save_s']:.1%}; memory at its peak "
        f"{peak / size:.3f} of the rank's share"
    )
    return found


def rank_shards(tensor: int, pipeline: int, data: int, rank: int) -> list[ParameterRange]:
    """Parameter ranges of a rank of the planned model under ZeRO-3; ranks count data first, then stages."""
    t, p, d = rank % tensor, rank // tensor // data, rank // tensor % data
    first, last = (BLOCKS * s // pipeline for s in (p, p + 1))
    cut = {"qkv.weight": 0, "qkv.bias": 0, "up.weight": 0, "up.bias": 0, "modulation.weight": 0, "modulation.bias": 0,
           "attention.branch.out.weight": 1, "mlp.branch.down.weight": 1}  # fmt: skip
    shards, start = [], 0
    for name, shape in _SHAPES.items():
        if not first <= int(name.split(".")[1]) < last:
            continue
        dim = next((dim for end, dim in cut.items() if name.endswith(end)), None)
        part = UNSHARDED if dim is None or tensor == 1 else Slice(dim, t, tensor)
        mine = tuple(n // part.count if i == part.dim else n for i, n in enumerate(shape))
        size = -(-math.prod(mine) // data)
        begin = min(d * size, math.prod(mine))
        count = min(size, math.prod(mine) - begin)
        if count and (part.count > 1 or t == 0):
            shards.append(ParameterRange(name, mine, begin, count, start, part))
            start += count
    return shards


_SHAPES = shapes_of(BLOCKS, WIDTH)


def write_index(arguments: tuple[str, tuple[int, int, int], int]) -> list[FileRecord]:
    """Write a rank's index beside a sparse data file."""
    folder, layout, rank = arguments
    table = slice_table(rank_shards(*layout, rank))
    elements = int(table.slices.numel.sum())
    size = 512 + 16 * elements
    stem = Path(folder) / f"rank_{rank:05d}"
    content = encode_index(table, list(STATE_ENTRIES), 512, [0] * (1 + len(STATE_ENTRIES) * blocks_in(elements)))
    Path(f"{stem}{INDEX}").write_bytes(content)
    with Path(f"{stem}{DATA}").open("wb") as file:
        file.truncate(size)
    return [
        FileRecord(name=stem.name + DATA, bytes=size),
        FileRecord(name=stem.name + INDEX, bytes=len(content), xxh3=digest(content), spans=coverage_bounds(table)),
    ]


def planning(written: tuple[int, int, int], read: tuple[int, int, int], where: str | None) -> dict[str, Any]:
    world = math.prod(written)
    with tempfile.TemporaryDirectory(dir=where) as root:
        directory = CheckpointDirectory(Location(root))
        folder = directory.begin(1)
        with ProcessPoolExecutor(2) as pool:
            work = ((str(folder), written, rank) for rank in range(world))
            files = [record for records in pool.map(write_index, work, chunksize=16) for record in records]
        directory.commit(1, {"step": 1}, files)
        commit = (Path(str(folder)) / "commit.json").stat().st_size
        seconds, opened = [], []
        for rank in (0, world // 3, world - 1):
            table = slice_table(rank_shards(*read, rank))
            begin = time.perf_counter()
            _, reader = open_checkpoint(folder, table)
            reader.plan(table)
            seconds.append(time.perf_counter() - begin)
            opened.append(len(reader.files))
    layouts = ["tp{} pp{} dp{}".format(*layout) for layout in (written, read)]
    print(
        f"{world:,} ranks, {layouts[0]} read as {layouts[1]}: {max(seconds):.2f} s a rank at most, "
        f"{max(opened)} of {world:,} indices opened, commit of {commit / 1e6:.1f} MB"
    )
    return {"world": world, "layouts": layouts, "seconds": seconds, "opened": opened, "commit_bytes": commit}


def sections(args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    if args.only in (None, "bandwidth"):
        yield "bandwidth", {name: bandwidth(name, args.rounds, args.dir) for name in SETS}
    if args.only in (None, "stall"):
        yield "stall", {name: stall(name, args.rounds, args.dir) for name in SETS}
    if args.only in (None, "planning"):
        print("\nPlanning a load\n")
        pairs = [((4, 8, 16), (2, 4, 64)), ((8, 16, 32), (4, 8, 128))]
        yield "planning", [planning(written, read, args.dir) for written, read in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", help="folder on the disk to measure (default: the system's temporary)")
    parser.add_argument("--only", choices=("bandwidth", "stall", "planning"))
    args = parser.parse_args()
    found = read_results(__file__)
    found |= dict(sections(args)) | {"torch": torch.__version__}
    write_results(__file__, found)


if __name__ == "__main__":
    main()
