"""Time of a training step of DiT-S/2 on one process: rdm_scale, with and without ZeRO-3, against diffusers.

A step is forward, backward and AdamW on 32x32x4 latents; ZeRO-3 gathers parameters once a step
(`parallel.keep_gathered=always`) or by block (`never`). All alternate in one run, so that a machine that slows down
slows all of them; medians are compared. Rows named `ours` are rdm_scale: the model in a plain loop, and as it is
trained, eager and with compiled blocks (`train.compile`). For `never`, DeepSpeed replaces
`torch.nn.functional.linear` in the process by a version for weights that are freed between uses; the other rows get the
original back. Prints a table, writes benchmarks/results/step_time.json.

    OMP_NUM_THREADS=2 python benchmarks/step_time.py --batch-size 2 --rounds 15
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from benchmarks.report import print_table, write_results
from benchmarks.synthetic import SquaredError
from rdm_scale.batch import TrainingBatch
from rdm_scale.config import RunConfig, load_config
from rdm_scale.models import build_model
from rdm_scale.parallel.mesh import Mesh, build_mesh
from rdm_scale.parallel.parallelize import parallelize
from rdm_scale.parallel.plan import plan_parallelism
from rdm_scale.training.optimizer import build_optimizer

LINEAR = functional.linear
PLAIN, KEPT, BY_BLOCK = "ours", "ours, ZeRO-3 kept gathered", "ours, ZeRO-3 by block"
COMPILED = f"{KEPT}, compiled"
# (what, against what, aim) in the table's last lines
AIMS = ((KEPT, PLAIN, 1.03), (COMPILED, "diffusers", 0.9))
Step = Callable[[Tensor, Tensor, Tensor, Tensor], None]  # latents [B, 4, 32, 32], timesteps, labels, target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    steps, parameters = make_steps(options.batch_size)
    times: dict[str, list[float]] = {name: [] for name in steps}
    linear_of_deepspeed = functional.linear
    for round_number in tqdm(range(options.rounds + 2), unit="round"):
        batch = make_batch(options.batch_size, round_number)
        for name, step in steps.items():
            functional.linear = linear_of_deepspeed if name == BY_BLOCK else LINEAR
            began = time.perf_counter()
            step(*batch)
            if round_number >= 2:  # the first two allocate
                times[name].append(time.perf_counter() - began)
    report(options, times, parameters)


def make_steps(batch_size: int) -> tuple[dict[str, Step], dict[str, int]]:
    overrides = [f"train.global_batch_size={batch_size}", "train.precision=fp32", "optimizer.grad_clip=0"]

    def zero(*more: str) -> Step:
        return zero_step(load_config("configs/dit_s.yaml", [*overrides, *more]), mesh)

    config = load_config("configs/dit_s.yaml", overrides)
    model_config, make_optimizer = config.model, partial(build_optimizer, config.optimizer, config.model)
    ours = build_model(model_config)
    theirs = DiTTransformer2DModel(
        num_attention_heads=model_config.num_heads,
        attention_head_dim=model_config.hidden_size // model_config.num_heads,
        in_channels=4,
        out_channels=8,
        num_layers=model_config.depth,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    mesh = build_mesh(config.parallel)
    kept, eager = "parallel.keep_gathered=always", "train.compile=false"
    steps = {
        "diffusers": plain_step(theirs, lambda x, t, y: theirs(x, t, y).sample, adamw(theirs)),
        PLAIN: plain_step(ours, lambda x, t, y: ours(x[:, :, None], t, y).squeeze(2), make_optimizer(ours)),
        KEPT: zero(kept, eager),
        COMPILED: zero(kept, "train.compile=true"),
        BY_BLOCK: zero("parallel.keep_gathered=never", eager),
    }
    models = {name: theirs if name == "diffusers" else ours for name in steps}
    return steps, {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}


def zero_step(config: RunConfig, mesh: Mesh) -> Step:
    make_optimizer = partial(build_optimizer, config.optimizer, config.model)
    model = parallelize(config, mesh, plan_parallelism(config, mesh.world_size, None), make_optimizer)

    def step(latents: Tensor, timesteps: Tensor, labels: Tensor, target: Tensor) -> None:
        numbers = torch.arange(len(labels))
        batch = TrainingBatch(0, numbers, numbers, latents[:, :, None], target[:, :, None], timesteps, labels)
        model.accumulate([batch], SquaredError())
        model.step(config.optimizer.lr)

    return step


def plain_step(
    model: nn.Module, forward: Callable[[Tensor, Tensor, Tensor], Tensor], optimizer: torch.optim.Optimizer
) -> Step:
    model.train()

    def step(latents: Tensor, timesteps: Tensor, labels: Tensor, target: Tensor) -> None:
        loss_of(forward(latents, timesteps, labels), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0, fused=True)


def loss_of(prediction: Tensor, target: Tensor) -> Tensor:
    return ((prediction - target) ** 2).mean()


def make_batch(size: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(size, 4, 32, 32, generator=generator)
    timesteps = torch.randint(1000, (size,), generator=generator)
    labels = torch.randint(1000, (size,), generator=generator)
    return latents, timesteps, labels, torch.randn(size, 8, 32, 32, generator=generator)


def report(options: argparse.Namespace, times: dict[str, list[float]], parameters: dict[str, int]) -> None:
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {name: median / medians["diffusers"] for name, median in medians.items()}
    to_plain = {name: median / medians[PLAIN] for name, median in medians.items()}
    rows = [
        (name, f"{parameters[name]:,}", f"{medians[name]:.3f}", f"{ratios[name]:.3f}", f"{to_plain[name]:.3f}")
        for name in times
    ]
    header = (f"DiT-S/2, batch {options.batch_size}", "parameters", "median step (s)", "of diffusers'", "of ours")
    print_table(header, rows)
    for name, base, aim in AIMS:
        print(f"\n{name} over {base}: {medians[name] / medians[base]:.3f}, aim {aim}")
    result = {
        "batch_size": options.batch_size,
        "rounds": options.rounds,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "parameters": parameters,
        "median_s": medians,
        "ratio_to_diffusers": ratios,
        "ratio_to_plain_loop": to_plain,
    }
    write_results(__file__, result)


if __name__ == "__main__":
    main()
