"""Checkpoint formats side by side: a plain file, PyTorch's DCP, DCP over safetensors and rdm_scale's own.

    python benchmarks/checkpoint_storage.py [--tensors 56000] [--width 36] [--repeats 3] [--dir /tmp] [--out FILE.json]

One process saves and loads the weights, Adam's state and the EMA weights of a deep model (14 tensors per block, four
entries each), alternating between formats, several times; the table shows medians. Every save ends with fsync, every
load fills existing tensors, and files are in the page cache, so that the differences are work per tensor and per byte.
"""

import argparse
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from benchmarks.plain_file import load_plain, save_plain
from benchmarks.report import print_table, results_file, write_results
from rdm_scale.checkpoint.directory import CheckpointDirectory
from rdm_scale.checkpoint.format.slices import SliceTable, pad_rows
from rdm_scale.checkpoint.format.writer import write_tensors
from rdm_scale.storage.location import Location

STATE_ENTRIES = ("weights", "exp_avg", "exp_avg_sq", "ema")


def shapes_of(blocks: int, width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of `blocks` transformer blocks."""
    linear = {
        "attention.branch.qkv": (3 * width, width),
        "attention.branch.out": (width, width),
        "mlp.branch.up": (4 * width, width),
        "mlp.branch.down": (width, 4 * width),
        "modulation": (6 * width, width),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(blocks):
        for unit in ("attention", "mlp"):
            shapes[f"blocks.{i}.{unit}.gate.a"] = shapes[f"blocks.{i}.{unit}.gate.b"] = (width,)
        for name, shape in linear.items():
            shapes[f"blocks.{i}.{name}.weight"], shapes[f"blocks.{i}.{name}.bias"] = shape, shape[:1]
    return shapes


@dataclass(frozen=True)
class Storage:
    """A way of storing a checkpoint."""

    name: str
    save: Callable[[Path, dict[str, Tensor]], None]  # into an empty folder
    load: Callable[[Path, dict[str, Tensor]], None]  # in place


def storages(shapes: dict[str, tuple[int, ...]]) -> list[Storage]:
    """The four to compare; each takes {entry: flat tensor of all parameters}."""
    table = SliceTable.of_tensors(list(shapes), pad_rows(list(shapes.values()), 2))

    def by_name(flats: dict[str, Tensor]) -> dict[str, Tensor]:
        sizes = [math.prod(shape) for shape in shapes.values()]
        return {
            f"{entry}.{name}": part.view(shape)
            for entry, flat in flats.items()
            for (name, shape), part in zip(shapes.items(), flat.split(sizes), strict=True)
        }

    def save_ours(folder: Path, flats: dict[str, Tensor]) -> None:
        directory = CheckpointDirectory(Location(folder))
        records = write_tensors(directory.begin(1), 0, table, flats)
        directory.commit(1, {"step": 1}, records)

    def load_ours(folder: Path, flats: dict[str, Tensor]) -> None:
        _, reader = CheckpointDirectory(Location(folder)).open(1)
        for entry, flat in flats.items():
            reader.fill(table, entry, flat)

    return [
        Storage("plain file", save_plain, load_plain),
        Storage(
            "DCP",
            lambda folder, flats: dcp.save(by_name(flats), checkpoint_id=folder),
            lambda folder, flats: dcp.load(by_name(flats), checkpoint_id=folder),
        ),
        Storage(
            "DCP over safetensors",
            lambda folder, flats: dcp.save(by_name(flats), storage_writer=HuggingFaceStorageWriter(str(folder))),
            lambda folder, flats: dcp.load(by_name(flats), storage_reader=HuggingFaceStorageReader(str(folder))),
        ),
        Storage("rdm_scale", save_ours, load_ours),
    ]


def measure(storage: Storage, folder: Path, flats: dict[str, Tensor]) -> tuple[float, float, int]:
    """Seconds to save and to load, and bytes on disk; stops when what was loaded is not what was saved."""
    folder.mkdir()
    begin = time.perf_counter()
    storage.save(folder, flats)
    saved = time.perf_counter() - begin
    loaded = {entry: torch.zeros_like(flat) for entry, flat in flats.items()}
    begin = time.perf_counter()
    storage.load(folder, loaded)
    seconds = time.perf_counter() - begin
    if not all(torch.equal(loaded[entry], flat) for entry, flat in flats.items()):
        raise SystemExit(f"{storage.name} did not give back what was saved")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    shutil.rmtree(folder)
    return saved, seconds, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=56_000, help="tensors in all; 56 make a block")
    parser.add_argument("--width", type=int, default=36)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dir", default=None, help="folder on the disk to measure (default: the system's temporary)")
    parser.add_argument("--out", type=Path, default=results_file(__file__))
    args = parser.parse_args()

    blocks = max(1, args.tensors // 56)
    shapes = shapes_of(blocks, args.width)
    elements = sum(math.prod(shape) for shape in shapes.values())
    flats = {
        entry: torch.randn(elements, generator=torch.Generator().manual_seed(i))
        for i, entry in enumerate(STATE_ENTRIES)
    }
    times: dict[str, list[tuple[float, float, int]]] = {}
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        for repeat in range(args.repeats):
            for storage in storages(shapes):
                times.setdefault(storage.name, []).append(measure(storage, Path(folder) / "checkpoint", flats))
            print(f"repeat {repeat + 1} of {args.repeats} done", flush=True)
        dist.destroy_process_group()
    report(times, args, len(shapes) * len(STATE_ENTRIES), elements)


def report(
    times: dict[str, list[tuple[float, float, int]]], args: argparse.Namespace, tensors: int, elements: int
) -> None:
    """Print the table; write medians and all measurements as JSON."""
    size = elements * 4 * len(STATE_ENTRIES)
    found = {
        name: {
            "save_s": statistics.median(save for save, _, _ in runs),
            "load_s": statistics.median(load for _, load, _ in runs),
            "bytes": runs[0][2],
            "all_save_s": [save for save, _, _ in runs],
            "all_load_s": [load for _, load, _ in runs],
        }
        for name, runs in times.items()
    }
    print(f"\n{tensors:,} tensors, {size / 1e6:.0f} MB, torch {torch.__version__}, median of {args.repeats}")
    plain = found["plain file"]
    rows = [
        (
            name,
            *(f"{row[key]:.2f}" for key in ("save_s", "load_s")),
            *(f"{row[key] / plain[key]:.1f}" for key in ("save_s", "load_s")),
            f"{row['bytes'] / size:.3f}",
        )
        for name, row in found.items()
    ]
    print_table(("storage", "save s", "load s", "save / plain", "load / plain", "size / tensors"), rows)
    result = {"tensors": tensors, "tensor_bytes": size, "repeats": args.repeats, "torch": torch.__version__, **found}
    write_results(args.out, result)


if __name__ == "__main__":
    main()
