"""Cost per block in a model of 1,000 blocks against one of 28, for `ParallelModel` and for plain PyTorch.

The model is narrow and has few tokens, so that the cost of a block beside its arithmetic shows: hooks, bookkeeping,
anything that grows faster than the depth. A step is forward, backward and AdamW on one process; `ours` is
`ParallelModel` under ZeRO-3 with the parameters kept gathered, `plain` is `build_model` and a loop. All four alternate
in one run, one step of 1,000 blocks for every 1,000 / 28 steps of 28. The fastest round of each counts (wall time, to
which other processes can only add), beside the median of CPU time. `superlinear` is the cost per block at 1,000 blocks
over that at 28, for `ours` over the same for `plain`. Start-up is `parallelize` at several depths, once each.

Prints Markdown and writes benchmarks/results/depth.json.

    OMP_NUM_THREADS=1 python benchmarks/depth.py --rounds 5
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.report import print_table, write_results
from benchmarks.synthetic import SquaredError, random_batch
from rdm_scale.config import RunConfig, parse_config
from rdm_scale.models import build_model
from rdm_scale.parallel.mesh import Mesh, build_mesh
from rdm_scale.parallel.parallelize import ParallelModel, parallelize
from rdm_scale.parallel.plan import plan_parallelism
from rdm_scale.training.optimizer import build_optimizer

SHALLOW, DEEP = 28, 1000
STARTED = (28, 250, 500, 1000)  # depths whose start-up is timed
Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=2)
    options = parser.parse_args()
    configure = partial(configuration, options.width, options.batch_size)
    mesh = build_mesh(configure(SHALLOW).parallel)
    start_s, models = start(configure, mesh)
    steps = {("ours", depth): ours(model) for depth, model in models.items()}
    steps |= {("plain", depth): plain(configure(depth)) for depth in (SHALLOW, DEEP)}
    times: dict[tuple[str, int], list[tuple[float, float]]] = {key: [] for key in steps}
    for round_number in tqdm(range(options.rounds + 1), unit="round"):
        for key, step in steps.items():
            taken = turn(step, repeats=DEEP // key[1])
            if round_number:  # the first one allocates
                times[key].append(taken)
    report(options, times, start_s)


def configuration(width: int, batch_size: int, depth: int) -> RunConfig:
    tree = {
        "model": {
            "input": {"channels": 4, "height": 8, "width": 8},
            "hidden_size": width,
            "num_heads": 4,
            "depth": depth,
            "num_classes": 10,
        },
        "data": {"train": "none"},
        "optimizer": {"grad_clip": 0.0},
        "train": {"global_batch_size": batch_size},
        "parallel": {"zero_stage": 3, "keep_gathered": "always"},
        "run": {"dir": "none"},
    }
    return parse_config(tree, "the benchmark")


def start(configure: Callable[[int], RunConfig], mesh: Mesh) -> tuple[dict[int, float], dict[int, ParallelModel]]:
    """Time `parallelize` at each depth; keep the models to train."""
    parallel_model(configure(2), mesh)  # warm-up of the libraries
    seconds, models = {}, {}
    for depth in STARTED:
        gc.collect()
        began = time.perf_counter()
        model = parallel_model(configure(depth), mesh)
        seconds[depth] = time.perf_counter() - began
        if depth in (SHALLOW, DEEP):
            models[depth] = model
        del model
    return seconds, models


def parallel_model(config: RunConfig, mesh: Mesh) -> ParallelModel:
    return parallelize(
        config, mesh, plan_parallelism(config, 1, None), partial(build_optimizer, config.optimizer, config.model)
    )


def ours(model: ParallelModel) -> Step:
    batch = random_batch(model.config.model.input, model.config.train.global_batch_size)

    def step() -> None:
        model.accumulate([batch], SquaredError())
        model.step(1e-4)

    return step


def plain(config: RunConfig) -> Step:
    batch = random_batch(config.model.input, config.train.global_batch_size)
    model, objective = build_model(config.model), SquaredError()
    optimizer = build_optimizer(config.optimizer, config.model, model)

    def step() -> None:
        objective.sample_losses(model(*objective.model_inputs(batch)), batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def turn(step: Step, repeats: int) -> tuple[float, float]:
    """Mean wall and CPU seconds of a step."""
    began, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - began) / repeats, (time.process_time() - cpu) / repeats


def report(
    options: argparse.Namespace, times: dict[tuple[str, int], list[tuple[float, float]]], start_s: dict[int, float]
) -> None:
    result: dict[str, Any] = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    result |= vars(options) | {"start_s": start_s}
    fastest = {(name, d): min(wall for wall, _ in taken) / d for (name, d), taken in times.items()}
    cpu = {(name, d): statistics.median(c for _, c in taken) / d for (name, d), taken in times.items()}
    for what, costs in (("wall", fastest), ("cpu", cpu)):
        growth = {name: costs[name, DEEP] / costs[name, SHALLOW] for name in ("ours", "plain")}
        result[what] = {
            "block_s": {f"{name} {depth}": cost for (name, depth), cost in costs.items()},
            "growth": growth,
            "superlinear": growth["ours"] / growth["plain"],
        }
        rows = [
            (name, *(f"{1e3 * costs[name, depth]:.3f}" for depth in (SHALLOW, DEEP)), f"{ratio:.3f}")
            for name, ratio in growth.items()
        ]
        rows.append(("ours over plain", "", "", f"{result[what]['superlinear']:.3f}"))
        print_table((f"{what} time of a block (ms)", f"{SHALLOW} blocks", f"{DEEP} blocks", "ratio"), rows)
    starts = [(depth, f"{seconds:.2f}", f"{1e3 * seconds / depth:.1f}") for depth, seconds in start_s.items()]
    print_table(("blocks", "start-up (s)", "for each block (ms)"), starts)
    write_results(__file__, result)


if __name__ == "__main__":
    main()
