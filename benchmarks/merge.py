"""Time and peak memory of merging a checkpoint whose EMA weights have 5 GB.

    OMP_NUM_THREADS=1 python benchmarks/merge.py [--dir /tmp]

Writes a checkpoint with nothing but EMA weights, merges it with tools/merge_checkpoint.py in a process of its own, and
reports the largest resident memory of that process, imports included. Prints Markdown, writes
benchmarks/results/merge.json.
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.report import ROOT, print_table, write_results
from rdm_scale.checkpoint import CheckpointDirectory
from rdm_scale.checkpoint.convert.checkpoint_writer import write_checkpoint
from rdm_scale.checkpoint.model_source import parameter_shapes
from rdm_scale.codecs.record import CodecRecord
from rdm_scale.config import parse_config
from rdm_scale.storage.location import Location

TOOL = ROOT / "tools" / "merge_checkpoint.py"
MODEL = {
    "hidden_size": 1536,
    "num_heads": 16,
    "depth": 29,
    "residual": "adaln_zero",
    "timestep_spacing": "diffusers",
}
OPTIONS = {"merged, fp32": [], "merged, bf16": ["--dtype", "bf16"], "diffusers, fp32": ["--to", "diffusers"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="a local folder with 10 GB free")
    args = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        size = write(Path(scratch) / "run")
        for name, options in OPTIONS.items():
            rows[name] = {"checkpoint_bytes": size, **measure(Path(scratch), options)}
            print(name, rows[name], flush=True)
    print_table(
        ("", "checkpoint GB", "s", "peak GB"),
        (
            (name, f"{row['checkpoint_bytes'] / 1e9:.2f}", f"{row['s']:.1f}", f"{row['peak_bytes'] / 1e9:.2f}")
            for name, row in rows.items()
        ),
    )
    write_results(__file__, {"torch": torch.__version__, **rows})


def write(folder: Path) -> int:
    """Write a checkpoint with EMA weights only; return its bytes."""
    tree = {
        "model": MODEL,
        "data": {"train": "none"},
        "run": {"dir": str(folder)},
    }
    config = parse_config(tree, "the benchmark")
    state = {
        "step": 1,
        "config": config.model_dump(mode="json"),
        "codec": CodecRecord(name="identity", location="identity").model_dump(mode="json"),
        "class_names": [],
        "layout": {},
    }

    def tensors() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, shape in parameter_shapes(config.model).items():
            yield name, {"ema": torch.rand(math.prod(shape)).view(shape)}

    written = write_checkpoint(CheckpointDirectory(Location(folder / "checkpoints")), state, tensors())
    return sum(file.stat().st_size for file in Path(written.path).iterdir())


def measure(scratch: Path, options: list[str]) -> dict[str, float]:
    command = [sys.executable, str(TOOL), str(scratch / "run"), str(scratch / "out"), *options]
    began = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    shutil.rmtree(scratch / "out")
    return {"s": time.perf_counter() - began, "peak_bytes": usage.ru_maxrss * 1024}


if __name__ == "__main__":
    main()
