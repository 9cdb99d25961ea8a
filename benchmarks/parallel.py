"""Step time, traffic, pipeline bubble and memory of layouts of 8 ranks, each against its plan.

All layouts train one model on one global batch. The ranks are processes that share this machine's cores, so wall time
compares layouts by their total work, not by what they would take on 8 devices; beside it stands the CPU time of all
ranks, which other processes of the machine hardly change.

    traffic  bytes that a rank sends in one step, ring algorithms assumed, by axis of the mesh (benchmarks/traffic.py)
    bubble   idle share of the pipeline's ranks: `planned` from floating-point operations, as in the plan's table;
             `replayed` by simulating the schedule with the measured CPU times of each chunk's forwards and backwards.
             Two ranks on two cores can be observed in real time: `observed` is the share of the time between the
             first action and the last that ranks did not spend in forwards and backwards, but in receives
    memory   bytes of live tensors by kind at the end of a step's last backward, before gradients are reduced; `planned`
             is the plan's table. The peak is that of the process during a step, minus its memory before the model was
             built and minus pages of libraries; it includes activations and transport buffers. It is measured in a
             separate run, in which malloc returns freed memory to the system

Prints Markdown, writes benchmarks/results/parallel.json and docs/images/parallel.png.

    python benchmarks/parallel.py --steps 3
"""

import argparse
import itertools
import os
import statistics
import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from benchmarks.memory import KINDS, forget_peak, give_memory_back, live_storages, looking_at_the_end, peak_since, rss
from benchmarks.report import IMAGES, print_table, read_results, write_results
from benchmarks.synthetic import SquaredError, random_batch
from benchmarks.traffic import TrafficCounter
from rdm_scale.config import RunConfig, parse_config
from rdm_scale.parallel.parallel_model import ParallelModel
from rdm_scale.parallel.pipeline.schedules import FORWARD, Action, ActionKind, ChunkCost, build_schedule, simulate
from rdm_scale.parallel.plan import ParallelPlan, plan_parallelism
from tests.support.rank_pool import RankPool

PICTURE = IMAGES / "parallel.png"

MIB = 2**20
AXES = ("tensor", "pipeline", "data", "other")
KEPT: dict[str, Any] = {"zero_stage": 3, "keep_gathered": "always"}
BY_BLOCK: dict[str, Any] = {"zero_stage": 3, "keep_gathered": "never"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp8 ZeRO-1": {"zero_stage": 1},
    "dp8 ZeRO-2": {"zero_stage": 2},
    "dp8 ZeRO-3 kept": KEPT,
    "dp8 ZeRO-3 by block": BY_BLOCK,
    "tp2 dp4": KEPT | {"tensor": 2},
    "tp2+sequence dp4": KEPT | {"tensor": 2, "sequence": True},
    "pp2 dp4": KEPT | {"pipeline": 2},
    "pp2 dp4 by block": BY_BLOCK | {"pipeline": 2},
    "pp4 dp2 1f1b": KEPT | {"pipeline": 4},
    "pp4 dp2 1f1b recompute": KEPT | {"pipeline": 4, "recompute": "full"},
    "pp4 dp2 interleaved": KEPT | {"pipeline": 4, "schedule": "interleaved_1f1b"},
    "pp4 dp2 v": KEPT | {"pipeline": 4, "schedule": "v_1f1b"},
    "pp8": KEPT | {"pipeline": 8},
    "tp2 pp2 dp2": KEPT | {"tensor": 2, "pipeline": 2},
}
OBSERVED = {
    f"pp2 {name}": KEPT | {"pipeline": 2, "schedule": schedule}
    for name, schedule in {"1f1b": "1f1b", "interleaved": "interleaved_1f1b", "v": "v_1f1b"}.items()
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each layout")
    parser.add_argument("--observed-steps", type=int, default=8, help="steps of each layout of two ranks")
    parser.add_argument("--only", default="", help="measure layouts whose name contains this, and keep the others")
    options = parser.parse_args()
    pool = RankPool()
    result = earlier() if options.only else {"layouts": {}, "observed": {}}
    config = configuration({})
    result |= {"cores": os.cpu_count(), "torch": torch.__version__, "batch": config.train.global_batch_size}
    result |= {"model": config.model.model_dump(mode="json")}
    work = [("layouts", 8, options.steps, LAYOUTS), ("observed", 2, options.observed_steps, OBSERVED)]
    jobs = [(part, world, steps, *item) for part, world, steps, layouts in work for item in layouts.items()]
    for part, world, steps, name, parallel in (bar := tqdm([job for job in jobs if options.only in job[3]])):
        bar.set_description(name)
        config = configuration(parallel)
        timed = pool.run(world, measure, config, steps, timeout_s=300)
        exact = pool.run(world, measure, config, 0, timeout_s=300)
        ranks = [a | {key: b[key] for key in ("live", "peak", "start_peak")} for a, b in zip(timed, exact, strict=True)]
        result[part][name] = summary(config, world, ranks)
        write_results(__file__, result)
    layouts = {name: result["layouts"][name] for name in LAYOUTS if name in result["layouts"]}
    print_layouts(layouts)
    print_memory(layouts)
    print_observed(result["observed"])
    draw(layouts)


def earlier() -> dict[str, Any]:
    return read_results(__file__) or {"layouts": {}, "observed": {}}


def configuration(parallel: dict[str, Any]) -> RunConfig:
    tree = {
        "model": {
            "input": {"channels": 4, "height": 8, "width": 16},
            "hidden_size": 256,
            "num_heads": 4,
            "depth": 16,
            "num_classes": 10,
        },
        "data": {"train": "none"},
        "train": {"global_batch_size": 16, "micro_batch_size": 1},
        "parallel": parallel,
        "run": {"dir": "none"},
    }
    return parse_config(tree, "the benchmark")


# ---- on each rank


class Clock:
    """Timer of a rank's pipeline actions: CPU seconds, and wall seconds without receives."""

    def __init__(self, model: ParallelModel) -> None:
        self.marks: list[tuple[Action | None, float, float, float]] = []
        self.channels = model.channels
        model.on_action = self._mark

    def spans(self) -> list[tuple[Action, float, float]]:
        """Actions with their CPU and wall seconds."""
        return [
            (action, cpu - cpu_before, wall - before - (waited - waited_before))
            for (action, cpu_before, before, waited_before), (_, cpu, wall, waited) in itertools.pairwise(self.marks)
            if action is not None
        ]

    def _mark(self, action: Action | None) -> None:
        waited = 0.0 if self.channels is None else self.channels.waited_s
        self.marks.append((action, time.thread_time(), time.perf_counter(), waited))


def measure(config: RunConfig, steps: int) -> dict[str, Any]:
    """Measure one rank (run by the pool). With `steps` = 0, memory figures are exact and nothing is timed."""
    if not steps:
        give_memory_back()
    from rdm_scale.parallel.mesh import build_mesh
    from rdm_scale.parallel.parallelize import parallelize
    from rdm_scale.training.optimizer import build_optimizer

    before, tensors_before = rss(), {storage for storage, _ in live_storages()}
    mesh = build_mesh(config.parallel)
    layout = plan_parallelism(config, mesh.world_size, None)
    began = time.perf_counter()
    model = parallelize(config, mesh, layout, partial(build_optimizer, config.optimizer, config.model))
    start_s, start_peak = time.perf_counter() - began, peak_since(before)
    samples = layout.micro_batch * layout.micro_batches
    batches = random_batch(config.model.input, samples, seed=mesh.data_rank).split(layout.micro_batch)

    def step() -> None:
        model.accumulate(batches, SquaredError())
        model.step(1e-4)
        model.update_ema(config.optimizer.ema_decay)

    step()  # allocates, and makes the optimizer state
    clock = Clock(model)
    timed = [timed_step(step, clock) for _ in range(steps)]
    found: list[dict[str, int]] = []
    forget_peak()
    with TrafficCounter(mesh, model.channels) as counter, looking_at_the_end(model, tensors_before, found):
        step()
    peak = peak_since(before)
    figures = {
        "pipeline_rank": mesh.pipeline_rank,
        "start_s": start_s,
        "start_peak": start_peak,
        "steps": timed,
        "peak": peak,
        "live": found[0],
        "calls": dict(counter.calls),
        "bytes": dict(counter.bytes),
        "sent": dict(counter.sent),
    }
    mesh.shutdown()
    return figures


def timed_step(step: Any, clock: Clock) -> dict[str, Any]:
    clock.marks.clear()
    dist.barrier()
    began, cpu = time.perf_counter(), time.process_time()
    step()
    ended = time.perf_counter()
    spans = clock.spans()
    return {
        "wall": (began, ended),
        "cpu": time.process_time() - cpu,
        "pipeline": (clock.marks[0][2], clock.marks[-1][2]),
        "busy": sum(wall for _, _, wall in spans),
        "forward_cpu": sum(cpu for action, cpu, _ in spans if action.kind is FORWARD),
        "backward_cpu": sum(cpu for action, cpu, _ in spans if action.kind is not FORWARD),
        "actions": [(action.chunk, action.kind, cpu) for action, cpu, _ in spans],
    }


# ---- over all ranks


def summary(config: RunConfig, world: int, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    layout = plan_parallelism(config, world, None)
    steps = range(len(ranks[0]["steps"]))
    busiest = max(ranks, key=lambda rank: sum(rank["sent"].values()))
    fullest = max(ranks, key=lambda rank: sum(rank["live"].values()))
    planned = layout.stages[fullest["pipeline_rank"]].bytes()
    planned_total = max(stage.total for stage in layout.stages)

    def cpu(name: str) -> float:
        return statistics.median(sum(rank["steps"][i][name] for rank in ranks) for i in steps)

    return {
        "step_s": statistics.median(wall_of(ranks, i) for i in steps),
        "cpu_s": {
            name: cpu(key) for name, key in (("all", "cpu"), ("forward", "forward_cpu"), ("backward", "backward_cpu"))
        },
        "start_s": max(rank["start_s"] for rank in ranks),
        "micro_batches": layout.micro_batches,
        "calls": busiest["calls"],
        "bytes": busiest["bytes"],
        "sent": busiest["sent"],
        "sent_by_axis": {axis: sum(n for k, n in busiest["sent"].items() if k.startswith(axis)) for axis in AXES},
        "bubble": bubbles(config, layout, ranks),
        "state": fullest["live"],
        "state_planned": {kind: planned[kind] for kind in KINDS[:-1]},
        "peak": max(rank["peak"] for rank in ranks),
        "start_peak": max(rank["start_peak"] for rank in ranks),
        "peak_planned": planned_total,
    }


def wall_of(ranks: list[dict[str, Any]], step: int) -> float:
    walls = [rank["steps"][step]["wall"] for rank in ranks]
    return max(ended for _, ended in walls) - min(began for began, _ in walls)


def bubbles(config: RunConfig, layout: ParallelPlan, ranks: list[dict[str, Any]]) -> dict[str, float]:
    """Planned, replayed and observed bubbles; the last is valid only if every rank has a core of its own."""
    place = layout.placement
    took: dict[tuple[int, ActionKind], list[float]] = {}
    for rank in ranks:
        for step in rank["steps"]:
            for chunk, kind, cpu in step["actions"]:
                took.setdefault((chunk, kind), []).append(cpu)
    medians = {key: statistics.median(values) for key, values in took.items()}
    schedule = build_schedule(config.parallel.schedule, place, layout.micro_batches)
    replay = simulate(
        schedule, place, lambda chunk: ChunkCost(medians[chunk, FORWARD], medians[chunk, ActionKind.BACKWARD])
    )
    return {
        "planned": layout.bubble,
        "replayed": replay.bubble,
        "observed": statistics.median(observed_bubble(ranks, i) for i in range(len(ranks[0]["steps"]))),
    }


def observed_bubble(ranks: list[dict[str, Any]], step: int) -> float:
    steps = [rank["steps"][step] for rank in ranks]
    span = max(s["pipeline"][1] for s in steps) - min(s["pipeline"][0] for s in steps)
    return 1 - sum(s["busy"] for s in steps) / (len(ranks) * span)


# ---- reports


def print_layouts(layouts: dict[str, Any]) -> None:
    rows = []
    for name, r in layouts.items():
        sent = " / ".join(f"{r['sent_by_axis'][axis] / MIB:,.1f}" for axis in AXES[:3])
        calls = {
            k.removeprefix("data "): n for k, n in r["calls"].items() if k.startswith("data ") if r["bytes"][k] / n > 64
        }
        said = ", ".join(f"{n} {kind}" for kind, n in calls.items()) if r["sent_by_axis"]["data"] else "none"
        bubble = f"{r['bubble']['planned']:.1%} / {r['bubble']['replayed']:.1%}" if "pp" in name else ""
        rows.append((name, f"{r['step_s']:.2f}", f"{r['cpu_s']['all']:.2f}", sent, said, bubble))
    sent_over = "sent over tensor / pipeline / data axis (MiB)"
    calls_on = "calls on the data axis"
    print_table(("layout", "step (s)", "CPU of all ranks (s)", sent_over, calls_on, "bubble planned / replayed"), rows)


def print_memory(layouts: dict[str, Any]) -> None:
    rows = []
    for name, r in layouts.items():
        found, planned = r["state"], r["state_planned"]
        cells = [f"{found[kind] / MIB:.1f} / {planned[kind] / MIB:.1f}" for kind in KINDS[:-1]]
        state = f"{(sum(found.values())) / MIB:.1f} / {sum(planned.values()) / MIB:.1f}"
        peak = f"{r['peak'] / MIB:.0f} / {r['peak_planned'] / MIB:.0f}"
        rows.append((name, *cells, f"{found['other'] / MIB:.1f}", state, peak))
    kinds = ("EMA" if kind == "average" else kind for kind in KINDS)
    print_table(("layout (MiB, found / planned)", *kinds, "state", "peak of the process"), rows)


def print_observed(layouts: dict[str, Any]) -> None:
    rows = []
    for name, r in layouts.items():
        cells = [f"{r['bubble'][kind]:.1%}" for kind in ("planned", "replayed", "observed")]
        rows.append((f"{name}, {r['micro_batches']} micro-batches", f"{r['step_s']:.2f}", *cells))
    print_table(("2 ranks on 2 cores", "step (s)", "bubble planned", "replayed", "observed"), rows)


def draw(layouts: dict[str, Any]) -> None:
    """Draw four panels of bars, one row per layout."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(layouts)
    figure, panels = pyplot.subplots(1, 4, figsize=(16, 5.6), sharey=True, layout="constrained")
    cpu = [r["cpu_s"] for r in layouts.values()]
    rest = [c["all"] - c["forward"] - c["backward"] for c in cpu]
    parts = {"forward": [c["forward"] for c in cpu], "backward": [c["backward"] for c in cpu]}
    stack(panels[0], names, parts | {"communication, engine, optimizer": rest})
    panels[0].plot([r["step_s"] for r in layouts.values()], names, "k|", markersize=11, mew=2, label="wall time")
    panels[0].set_title("CPU time of a step, all ranks (s)")
    axes = {axis: [r["sent_by_axis"][axis] / MIB for r in layouts.values()] for axis in AXES[:3]}
    stack(panels[1], names, axes)
    panels[1].set_title("sent by a rank in a step (MiB)")
    live = {kind: [r["state"][kind] / MIB for r in layouts.values()] for kind in KINDS}
    stack(panels[2], names, live)
    planned = [sum(r["state_planned"].values()) / MIB for r in layouts.values()]
    panels[2].plot(planned, names, "k|", markersize=11, mew=2, label="planned")
    panels[2].plot([r["peak"] / MIB for r in layouts.values()], names, "k.", label="peak of the process")
    panels[2].set_title("memory of a rank after the backwards (MiB)")
    piped = {name: r["bubble"] for name, r in layouts.items() if "pp" in name}
    panels[3].barh(list(piped), [100 * b["replayed"] for b in piped.values()], color="C4", label="replayed")
    panels[3].plot(
        [100 * b["planned"] for b in piped.values()], list(piped), "k|", markersize=11, mew=2, label="planned"
    )
    panels[3].set_title("bubble of the pipeline (%)")
    panels[0].invert_yaxis()
    for panel in panels:
        panel.grid(axis="x", alpha=0.3)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=3, frameon=False)
    figure.savefig(PICTURE, dpi=110)


def stack(panel: Any, names: list[str], parts: dict[str, list[float]]) -> None:
    """Draw stacked horizontal bars."""
    left = [0.0] * len(names)
    for label, values in parts.items():
        panel.barh(names, values, left=left, label=label)
        left = [a + b for a, b in zip(left, values, strict=True)]


if __name__ == "__main__":
    main()
