"""Rows of benchmarks/gpu.py: what is measured on one NVIDIA GPU, each row in a process of its own.

A row builds what it trains, takes one step (which compiles), and is then timed while no other row uses the card.
"""

import contextlib
import fcntl
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import ROOT
from rdm_scale import cost
from rdm_scale.batch import TrainingBatch
from rdm_scale.checkpoint import CheckpointDirectory, Saver
from rdm_scale.config import CheckpointConfig, RunConfig, load_config, parse_config
from rdm_scale.diffusion import build_objective
from rdm_scale.parallel.mesh import build_mesh
from rdm_scale.parallel.parallelize import ParallelModel, parallelize
from rdm_scale.parallel.plan import ParallelPlan, memory_of_rank, plan_parallelism
from rdm_scale.storage.location import Location
from rdm_scale.training.optimizer import build_optimizer

GIB = 2**30
LOCK = Path(tempfile.gettempdir()) / "rdm_scale_gpu_benchmark.lock"
EAGER = {"train.compile": "false", "train.cuda_graphs": "false"}


class Row(NamedTuple):
    """A measurement: a function that returns its figures, and the memory it is expected to need."""

    measure: Callable[["Timing"], dict[str, Any]]
    gib: Callable[[], float]


class Timing(NamedTuple):
    """Timing of a row: number of steps, and the file for its profile (None: none is made)."""

    steps: int
    profile: Path | None

    def of(self, step: Callable[[], Any]) -> dict[str, float]:
        """Medians over the steps: `step_ms` with the device's work, `host_ms` until Python was done with the step."""
        with using_gpu(alone=True):
            walls, hosts = [], []
            for number in range(3 + self.steps):
                torch.cuda.synchronize()
                began = time.perf_counter()
                step()
                host = time.perf_counter()
                torch.cuda.synchronize()
                if number >= 3:
                    walls.append(time.perf_counter() - began)
                    hosts.append(host - began)
            kernels = self._kernels(step)
        return {"step_ms": 1e3 * statistics.median(walls), "host_ms": 1e3 * statistics.median(hosts)} | kernels

    def _kernels(self, step: Callable[[], Any]) -> dict[str, float]:
        """Time inside kernels and their number in one step; the kernels by their time go into the profile."""
        if self.profile is None:
            return {}
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            step()
            torch.cuda.synchronize()
        events = [event for event in recorded.key_averages() if event.self_device_time_total > 0]
        events.sort(key=lambda event: -event.self_device_time_total)
        total, launches = sum(e.self_device_time_total for e in events) / 1e3, sum(e.count for e in events)
        lines = [f"{e.self_device_time_total / 1e3:9.3f} ms {e.count:6d} x {e.key[:160]}" for e in events[:60]]
        self.profile.parent.mkdir(parents=True, exist_ok=True)
        self.profile.write_text("\n".join([f"{total:.2f} ms in {launches} kernels", *lines]) + "\n")
        return {"kernel_ms": total, "launches": launches}


@contextlib.contextmanager
def using_gpu(*, alone: bool = False) -> Iterator[None]:
    """Hold the card, shared with other rows (that start and compile) or alone (to time)."""
    with LOCK.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def rows() -> dict[str, Row]:
    """Rows by name, the most important first."""
    none = Row(lambda timing: matrix_products(), lambda: 2.0)
    return {
        "matrix products": none,
        "dit_xl 64": _training("dit_xl", 64, "none"),
        "diffusers compiled": Row(partial(diffusers_training, compiled=True), lambda: 45.0),
        "1000 narrow blocks": _narrow(1000),
        "28 narrow blocks": _narrow(28),
        "dit_xl 64 selective": _training("dit_xl", 64, "selective"),
        "dit_xl 64 full": _training("dit_xl", 64, "full"),
        "depth_1b 32": _training("depth_1b", 32, "none"),
        "latte_xl 4": _training("latte_xl", 4, "none"),
        "dit_xl 64 no graphs": _training("dit_xl", 64, "none", {"train.cuda_graphs": "false"}),
        "dit_xl 64 eager": _training("dit_xl", 64, "none", EAGER),
        "dit_xl 64 by block": _training("dit_xl", 64, "none", {"parallel.keep_gathered": "never"}),
        "depth_3b 16 selective": _training("depth_3b", 16, "selective"),
        "28 narrow blocks eager": _narrow(28, EAGER),
        "latte_xl 4 eager": _training("latte_xl", 4, "none", EAGER),
        "diffusers eager": Row(partial(diffusers_training, compiled=False), lambda: 50.0),
        "save": Row(lambda timing: saving(), lambda: 30.0),
    }


def _training(name: str, samples: int, recompute: str, overrides: Mapping[str, str] | None = None) -> Row:
    config = partial(configuration, name, samples, recompute, overrides or {})
    return Row(lambda timing: training(timing, config()), lambda: planned_gib(config()))


def _narrow(depth: int, overrides: Mapping[str, str] | None = None) -> Row:
    config = partial(narrow_blocks, depth, overrides or {})
    return Row(lambda timing: training(timing, config()), lambda: planned_gib(config()))


def configuration(name: str, samples: int, recompute: str, overrides: Mapping[str, str]) -> RunConfig:
    settings = {
        "train.global_batch_size": samples,
        "train.micro_batch_size": samples,
        "train.precision": "bf16",
        "parallel.recompute": recompute,
        "parallel.zero_stage": 3,
        "parallel.keep_gathered": "always",
    }
    settings |= overrides
    return load_config(str(ROOT / "configs" / f"{name}.yaml"), [f"{key}={value}" for key, value in settings.items()])


def narrow_blocks(depth: int, overrides: Mapping[str, str]) -> RunConfig:
    """Many narrow blocks: the cost of a block beside its arithmetic."""
    tree: dict[str, Any] = {
        "model": {
            "input": {"channels": 4, "height": 32, "width": 32},
            "patch_size": [1, 2, 2],
            "hidden_size": 192,
            "num_heads": 3,
            "depth": depth,
            "num_classes": 1000,
        },
        "data": {"train": "none"},
        "train": {"global_batch_size": 8, "micro_batch_size": 8, "precision": "bf16"},
        "parallel": {"zero_stage": 3, "keep_gathered": "always", "recompute": "none"},
        "run": {"dir": "none"},
    }
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        tree[section][name] = {"false": False, "true": True}.get(value, value)
    return parse_config(tree, "the benchmark")


def planned(config: RunConfig) -> ParallelPlan:
    return plan_parallelism(config, 1, memory_of_rank(config))


def planned_gib(config: RunConfig) -> float:
    return planned(config).stages[0].total / GIB


def built(config: RunConfig) -> ParallelModel:
    return parallelize(
        config, build_mesh(config.parallel), planned(config), partial(build_optimizer, config.optimizer, config.model)
    )


def training(timing: Timing, config: RunConfig) -> dict[str, Any]:
    """Time the training step of a configuration: forward, backward, AdamW and EMA on random latents on the GPU."""
    with using_gpu():
        began = time.perf_counter()
        model = built(config)
        torch.cuda.synchronize()
        started_s = time.perf_counter() - began
        step = step_of(model)
        losses = [float(step()) for _ in range(3)]  # compiles, and captures graphs
        first_s = time.perf_counter() - began - started_s
    found = timing.of(step)
    samples, flops = config.train.global_batch_size, 3 * cost.model_flops(config.model)
    return found | {
        "start_s": started_s,
        "first_steps_s": first_s,
        "losses": losses,
        "samples_per_s": 1e3 * samples / found["step_ms"],
        "tflops": flops * samples / found["step_ms"] / 1e9,
        "parameters": cost.model_parameters(config.model).total,
        "depth": config.model.depth,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "planned_gib": planned_gib(config),
        "graph_breaks": graph_breaks(),
    }


def graph_breaks() -> dict[str, int]:
    from torch._dynamo.utils import counters

    return {str(reason)[:200]: count for reason, count in counters["graph_break"].items()}


def step_of(model: ParallelModel) -> Callable[[], torch.Tensor]:
    """Function that takes one training step and returns its mean loss, unread."""
    config = model.config
    objective = build_objective(config.diffusion, config.model.learned_variance)
    batch = random_batch(config)

    def step() -> torch.Tensor:
        losses = model.accumulate([batch], objective)
        model.step(1e-4)
        model.update_ema(0.999)
        return losses.mean()

    return step


def random_batch(config: RunConfig) -> TrainingBatch:
    samples, size = config.train.global_batch_size, config.model.input
    shape = (samples, size.channels, size.frames, size.height, size.width)
    numbers = torch.arange(samples, device="cuda")
    torch.manual_seed(0)  # the same in every row, so that their losses can be compared
    return TrainingBatch(
        step=0,
        positions=numbers,
        ids=numbers,
        latents=torch.randn(shape, device="cuda"),
        noise=torch.randn(shape, device="cuda"),
        t=torch.rand(samples, device="cuda") if config.diffusion.objective == "flow" else numbers.float(),
        condition=numbers % config.model.num_classes if config.model.condition == "class" else None,
    )


def matrix_products(size: int = 8192) -> dict[str, float]:
    """Rate of one large bf16 product."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found = Timing(20, None).of(lambda: a @ b)
    return {"tflops": 2 * size**3 / found["step_ms"] / 1e9}


def diffusers_training(timing: Timing, *, compiled: bool, samples: int = 64) -> dict[str, Any]:
    """Time diffusers' DiT-XL/2 under bf16 autocast with fp32 weights, fused AdamW, clipping and EMA: the peer."""
    from diffusers import DiTTransformer2DModel

    with using_gpu():
        model = DiTTransformer2DModel(
            num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28,
            sample_size=32, patch_size=2, num_embeds_ada_norm=1000,
        ).cuda()  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
        ema = [parameter.detach().clone() for parameter in model.parameters()]
        latents, target = torch.randn(samples, 4, 32, 32, device="cuda"), torch.randn(samples, 8, 32, 32, device="cuda")
        t, labels = (torch.arange(samples, device="cuda") for _ in range(2))
        predict = torch.compile(model, dynamic=False) if compiled else model

        def step() -> None:
            with torch.autocast("cuda", torch.bfloat16):
                prediction = predict(latents, t, labels).sample
            ((prediction.float() - target) ** 2).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                torch._foreach_lerp_(ema, list(model.parameters()), 1e-3)

        step()
    found = timing.of(step)
    flops = 3 * cost.model_flops(configuration("dit_xl", samples, "none", {}).model)
    return found | {
        "samples_per_s": 1e3 * samples / found["step_ms"],
        "tflops": flops * samples / found["step_ms"] / 1e9,
        "parameters": sum(p.numel() for p in model.parameters()),
        "depth": 28,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
    }


def saving() -> dict[str, Any]:
    """Time how long training waits at the start of a save, and the save itself; the first also pins host memory."""
    config = configuration("dit_xl", 16, "none", EAGER)
    model = built(config)
    step = step_of(model)
    found: dict[str, Any] = {"bytes": 16 * cost.model_parameters(config.model).total}
    with tempfile.TemporaryDirectory() as folder:
        directory = CheckpointDirectory(Location(folder) / "checkpoints")
        saver = Saver(directory, CheckpointConfig(keep=1), model, model.mesh, print)
        for number, name in enumerate(("first", "second"), start=1):
            step()
            torch.cuda.synchronize()
            began = time.perf_counter()
            saver.start({"step": number})
            stalled_s = time.perf_counter() - began
            saver.finish()
            found[name] = {"stall_s": stalled_s, "save_s": time.perf_counter() - began}
    return found
