"""Training steps on one NVIDIA GPU: speed, memory against the plan, cost of depth, and the stall of a save.

Latents are random and on the GPU, so that only the step is measured: forward, backward, AdamW and EMA of one
micro-batch, fully sharded with gathered parameters (ZeRO-3 kept), compiled and graphed as `auto` chooses, unless a
row's name says otherwise. `TFLOP/s` counts the model's own operations (three forwards, nothing for recomputation); `of
matmul` is that rate as a share of one large bf16 matrix product's on the same card in the same run; `host` is the time
until Python has issued the step. The peak is that of torch's allocator, `planned` the total of the plan's table. The
peer is diffusers' DiT-XL/2, compiled as a whole, under bf16 autocast with fp32 weights, as DiT trains. `stall` is how
long training waits at the start of a save for the copy to pinned host memory.

Each row runs in a process of its own with a time limit of its own, the most important first. Rows start and compile
beside each other (`--workers`) as far as their planned memory fits, and are timed alone. Prints Markdown, writes
benchmarks/results/gpu.json after every row; rows that failed or did not fit into `--limit` are named with the reason.

    python benchmarks/gpu.py --workers 3 --limit 540 --profiles /tmp/profiles
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from benchmarks.gpu_rows import Row, Timing, rows
from benchmarks.report import print_table, read_results, write_results


class Running(NamedTuple):
    """A row that is being measured in a process of its own."""

    name: str
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    began: float
    gib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each row")
    parser.add_argument("--only", nargs="*", help="measure the rows of these names, and keep the others")
    parser.add_argument("--workers", type=int, default=1, help="rows that start and compile beside each other")
    parser.add_argument("--row-limit", type=float, default=240, help="seconds of a row")
    parser.add_argument("--limit", type=float, default=3600, help="seconds of all rows")
    parser.add_argument("--profiles", type=Path, help="folder for a list of each row's kernels")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # in the process of one row
    options = parser.parse_args()
    if options.row:
        profile = options.profiles and options.profiles / f"{options.row.replace(' ', '_')}.txt"
        print("@" + json.dumps(rows()[options.row].measure(Timing(options.steps, profile))))
        return
    unknown = set(options.only or []) - set(rows())
    if unknown:
        parser.error(f"--only: there are no rows {sorted(unknown)}; there are {list(rows())}")
    result = read_results(__file__) if options.only else {}
    result |= {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    measure({name: row for name, row in rows().items() if name in (options.only or rows())}, options, result)
    report(result)


def measure(waiting: dict[str, Row], options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Measure rows in processes of their own, and write the results after each."""
    ends, card_gib = time.monotonic() + options.limit, torch.cuda.get_device_properties(0).total_memory / 2**30
    running: list[Running] = []
    while waiting or running:
        if time.monotonic() > ends:
            result |= {name: {"error": f"did not fit into --limit {options.limit:g}"} for name in waiting}
            waiting = {}
        for name in list(waiting):
            gib = waiting[name].gib() + 1  # the context of CUDA
            if len(running) == options.workers or (running and sum(r.gib for r in running) + gib > 0.9 * card_gib):
                break
            del waiting[name]
            running.append(start(name, options, gib))
        time.sleep(0.2)
        for row in list(running):
            limit_s = min(options.row_limit, options.limit)
            late = time.monotonic() > min(row.began + limit_s, ends + 20)
            if row.process.poll() is None and not late:
                continue
            running.remove(row)
            result[row.name] = finish(row, late=late)
            print(f"[{time.monotonic() - row.began:.0f} s] {row.name}: {json.dumps(result[row.name])}", flush=True)
            write_results(__file__, result)


def start(name: str, options: argparse.Namespace, gib: float) -> Running:
    command = [sys.executable, __file__, "--steps", str(options.steps), "--row", name]
    if options.profiles:
        command += ["--profiles", str(options.profiles)]
    output = tempfile.TemporaryFile()  # noqa: SIM115 (closed by finish)
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    return Running(name, process, output, time.monotonic(), gib)


def finish(row: Running, *, late: bool) -> dict[str, Any]:
    """Result of a row's process: its figures, or the end of what it printed as an error."""
    if late:
        row.process.kill()
    row.process.wait()
    with row.output as output:
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().splitlines()
    answers = [line for line in lines if line.startswith("@")]
    if row.process.returncode == 0 and answers:
        return dict(json.loads(answers[-1][1:]))
    reason = f"no result in {time.monotonic() - row.began:.0f} s; " if late else ""
    return {"error": reason + "\n".join(lines[-12:])[-1500:]}


def report(result: dict[str, Any]) -> None:
    ceiling = result.get("matrix products", {}).get("tflops", float("nan"))
    print(f"\n{result['gpu']}, torch {result['torch']}; matrix product {ceiling:.0f} TFLOP/s")
    table = []
    for name, row in result.items():
        if isinstance(row, dict) and "step_ms" in row:
            share, expected = row["tflops"] / ceiling, row.get("planned_gib")
            speed = f"{row['step_ms']:.1f}", f"{row['host_ms']:.1f}", f"{row['samples_per_s']:.1f}"
            rate = f"{row['tflops']:.0f}", f"{share:.0%}"
            memory = f"{row['peak_gib']:.1f}", "" if expected is None else f"{expected:.1f}"
            table.append((name, f"{row['parameters'] / 1e6:,.0f}", *speed, *rate, *memory))
    speed_header = ("step (ms)", "host (ms)", "samples/s", "TFLOP/s", "of matmul")
    print_table(("run", "parameters (M)", *speed_header, "peak (GiB)", "planned (GiB)"), table)
    for name, row in result.items():
        if isinstance(row, dict) and "error" in row:
            print(f"\n{name} could not be measured: {row['error']}")
    if "second" in result.get("save", {}):
        print(f"\na save of {result['save']['bytes'] / 1e9:.1f} GB: {result['save']}")


if __name__ == "__main__":
    main()
