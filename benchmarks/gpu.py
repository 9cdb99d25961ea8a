"""Training steps on one NVIDIA GPU: speed, memory against the plan, cost of depth, and the stall of a save.

Latents are random and on the GPU, so that only the step is measured: forward, backward and AdamW of one micro-batch.
`TFLOP/s` counts the model's own operations (three forwards, nothing for recomputation); `of matmul` is that rate as a
share of one large bf16 matrix product's on the same card in the same run. The peak is that of torch's allocator;
`planned` is the total of the plan's table. diffusers' DiT-XL/2 trains under bf16 autocast with fp32 weights, as DiT
did, in the same run. `stall` is how long training waits at the start of a save for the copy to pinned host memory; the
first save also allocates that memory.

Each row runs in a process of its own, because DeepSpeed never frees what a process has trained. Prints Markdown, writes
benchmarks/results/gpu.json.

    python benchmarks/gpu.py
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.report import ROOT, print_table, read_results, write_results
from rdm_scale import cost
from rdm_scale.batch import TrainingBatch
from rdm_scale.checkpoint import CheckpointDirectory, Saver
from rdm_scale.config import CheckpointConfig, RunConfig, load_config, parse_config
from rdm_scale.diffusion import build_objective
from rdm_scale.parallel.mesh import Mesh, build_mesh
from rdm_scale.parallel.parallelize import ParallelModel, parallelize
from rdm_scale.parallel.plan import ParallelPlan, memory_of_rank, plan_parallelism
from rdm_scale.storage.location import Location
from rdm_scale.training.optimizer import build_optimizer

GIB = 2**30
# (configuration, samples of a micro-batch, recompute, ZeRO)
STEPS = [
    ("dit_xl", 64, "none", "3 kept"),
    ("dit_xl", 64, "none", "3 by block"),
    ("dit_xl", 64, "selective", "3 kept"),
    ("dit_xl", 64, "full", "3 kept"),
    ("depth_1b", 48, "none", "3 kept"),
    ("latte_xl", 4, "none", "3 kept"),
    ("depth_3b", 16, "selective", "3 kept"),
]
DEPTHS = (28, 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each row")
    parser.add_argument("--only", default="", help="measure rows whose name contains this, and keep the others")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # in the process of one row
    options = parser.parse_args()
    rows = jobs(options.steps)
    if options.row:
        print("@" + json.dumps(rows[options.row]()))
        return
    result = read_results(__file__) if options.only else {}
    result |= {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    for name in tqdm([name for name in rows if options.only in name], unit="row"):
        result[name] = of_a_process(name, options.steps)
        write_results(__file__, result)
    report(result)


def jobs(steps: int) -> dict[str, Callable[[], Any]]:
    """Measurements by row name."""
    rows: dict[str, Callable[[], Any]] = {"matrix product": lambda: {"tflops": matmul_tflops()}}
    rows |= {" ".join(map(str, row)): partial(training, steps, *row) for row in STEPS}
    rows |= {"diffusers dit_xl 64": partial(diffusers_training, steps, 64)}
    rows |= {f"{depth} blocks": partial(deep, steps, depth) for depth in DEPTHS}
    return rows | {"save": saving}


def of_a_process(name: str, steps: int) -> dict[str, Any]:
    """Measure a row in a new process; an error becomes its result, so that the other rows still run."""
    command = [sys.executable, __file__, "--steps", str(steps), "--row", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    answers = [line for line in done.stdout.splitlines() if line.startswith("@")]
    if done.returncode == 0 and answers:
        return dict(json.loads(answers[-1][1:]))
    return {"error": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]}


def matmul_tflops(size: int = 8192) -> float:
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = median_s(lambda: a @ b, 10)
    return 2 * size**3 / seconds / 1e12


def median_s(step: Callable[[], Any], repeats: int, warm_up: int = 3) -> float:
    times = []
    for number in range(warm_up + repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if number >= warm_up:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def configuration(name: str, samples: int, recompute: str, zero: str) -> RunConfig:
    stage, _, gathering = zero.partition(" ")
    kept = {"": "auto", "kept": "always", "by block": "never"}[gathering]
    train = {"global_batch_size": samples, "micro_batch_size": samples, "precision": "bf16"}
    parallel = {"recompute": recompute, "zero_stage": stage, "keep_gathered": kept}
    overrides = [f"train.{k}={v}" for k, v in train.items()] + [f"parallel.{k}={v}" for k, v in parallel.items()]
    return load_config(str(ROOT / "configs" / f"{name}.yaml"), overrides)


def training(steps: int, name: str, samples: int, recompute: str, zero: str) -> dict[str, Any]:
    return measured(configuration(name, samples, recompute, zero), steps)


def measured(config: RunConfig, steps: int) -> dict[str, Any]:
    mesh = build_mesh(config.parallel)
    began = time.perf_counter()
    model, layout = built(mesh, config)
    started_s = time.perf_counter() - began
    step = step_of(model)
    seconds = median_s(step, steps)
    samples = config.train.global_batch_size
    return {
        "start_s": started_s,
        "step_ms": 1e3 * seconds,
        "samples_per_s": samples / seconds,
        "tflops": 3 * cost.model_flops(config.model) * samples / seconds / 1e12,
        "parameters": cost.model_parameters(config.model).total,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "planned_gib": layout.stages[0].total / GIB,
    }


def built(mesh: Mesh, config: RunConfig) -> tuple[ParallelModel, ParallelPlan]:
    layout = plan_parallelism(config, 1, memory_of_rank(config))
    return parallelize(config, mesh, layout, partial(build_optimizer, config.optimizer, config.model)), layout


def step_of(model: ParallelModel) -> Callable[[], None]:
    config = model.config
    objective = build_objective(config.diffusion, config.model.learned_variance)
    batch = random_batch(config)

    def step() -> None:
        model.accumulate([batch], objective)
        model.step(1e-4)
        model.update_ema(0.999)

    return step


def random_batch(config: RunConfig) -> TrainingBatch:
    samples, size = config.train.global_batch_size, config.model.input
    shape = (samples, size.channels, size.frames, size.height, size.width)
    numbers = torch.arange(samples, device="cuda")
    return TrainingBatch(
        step=0,
        positions=numbers,
        ids=numbers,
        latents=torch.randn(shape, device="cuda"),
        noise=torch.randn(shape, device="cuda"),
        t=torch.rand(samples, device="cuda") if config.diffusion.objective == "flow" else numbers.float(),
        condition=numbers % config.model.num_classes if config.model.condition == "class" else None,
    )


def diffusers_training(steps: int, samples: int) -> dict[str, Any]:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, sample_size=32,
        patch_size=2, num_embeds_ada_norm=1000,
    ).cuda()  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    latents, target = torch.randn(samples, 4, 32, 32, device="cuda"), torch.randn(samples, 8, 32, 32, device="cuda")
    t, labels = (torch.arange(samples, device="cuda") for _ in range(2))

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            prediction = model(latents, t, labels).sample
        ((prediction.float() - target) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = median_s(step, steps)
    flops = 3 * cost.model_flops(configuration("dit_xl", samples, "none", "3 kept").model)
    return {
        "step_ms": 1e3 * seconds,
        "samples_per_s": samples / seconds,
        "tflops": flops * samples / seconds / 1e12,
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
    }


def deep(steps: int, depth: int) -> dict[str, Any]:
    """Measure many narrow blocks: the cost of a block beside its arithmetic."""
    tree = {
        "model": {
            "input": {"channels": 4, "height": 32, "width": 32},
            "patch_size": [1, 2, 2],
            "hidden_size": 192,
            "num_heads": 3,
            "depth": depth,
            "num_classes": 1000,
        },
        "data": {"train": "none"},
        "train": {"global_batch_size": 32, "micro_batch_size": 32, "precision": "bf16"},
        "parallel": {"zero_stage": 3, "keep_gathered": "always", "recompute": "selective"},
        "run": {"dir": "none"},
    }
    found = measured(parse_config(tree, "the benchmark"), steps)
    return found | {"ms_a_block": found["step_ms"] / depth}


def saving() -> dict[str, Any]:
    config = configuration("dit_xl", 16, "none", "3 kept")
    mesh = build_mesh(config.parallel)
    model, _ = built(mesh, config)
    step = step_of(model)
    found: dict[str, Any] = {"bytes": 16 * cost.model_parameters(config.model).total}
    with tempfile.TemporaryDirectory() as folder:
        directory = CheckpointDirectory(Location(folder) / "checkpoints")
        saver = Saver(directory, CheckpointConfig(keep=1), model, mesh, print)
        for number, name in enumerate(("first", "second"), start=1):
            step()
            torch.cuda.synchronize()
            began = time.perf_counter()
            saver.start({"step": number})
            stalled_s = time.perf_counter() - began
            saver.finish()
            found[name] = {"stall_s": stalled_s, "save_s": time.perf_counter() - began}
    return found


def report(result: dict[str, Any]) -> None:
    ceiling = result["matrix product"]["tflops"]
    print(f"\n{result['gpu']}, torch {result['torch']}; matrix product {ceiling:.0f} TFLOP/s")
    rows = []
    for name, row in result.items():
        if isinstance(row, dict) and "step_ms" in row:
            share, planned = row["tflops"] / ceiling, row.get("planned_gib")
            speed = f"{row['step_ms']:.1f}", f"{row['samples_per_s']:.1f}", f"{row['tflops']:.0f}", f"{share:.0%}"
            memory = f"{row['peak_gib']:.1f}", "" if planned is None else f"{planned:.1f}"
            rows.append((name, f"{row['parameters'] / 1e6:,.0f}", *speed, *memory))
    speed_header = ("step (ms)", "samples/s", "TFLOP/s", "of matmul")
    print_table(("run", "parameters (M)", *speed_header, "peak (GiB)", "planned (GiB)"), rows)
    for name, row in result.items():
        if isinstance(row, dict) and "error" in row:
            print(f"\n{name} could not be measured: {row['error']}")
    if "stall_s" in result.get("save", {}).get("second", {}):
        print(f"\na save of {result['save']['bytes'] / 1e9:.1f} GB: {result['save']}")


if __name__ == "__main__":
    main()
