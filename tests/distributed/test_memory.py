"""Memory on real ranks against the plan: states while training, and the peak while the model is built."""

import gc
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import RankPool
from small_runs import run_config

from rdm_scale.config import RunConfig
from rdm_scale.data.prefetch import TrainingBatch

WIDE = {"model__hidden_size": 256, "model__depth": 8, "model__num_heads": 4, "train__global_batch_size": 8}


def random_batch(config: RunConfig, samples: int) -> TrainingBatch:
    size = config.model.input
    latents = torch.randn(samples, size.channels, size.frames, size.height, size.width)
    numbers = torch.arange(samples)
    return TrainingBatch(0, numbers, numbers, latents, torch.randn_like(latents), torch.rand(samples), numbers % 4)


def parallel_model(config: RunConfig) -> Any:
    from rdm_scale.parallel.layout import plan
    from rdm_scale.parallel.mesh import build_mesh
    from rdm_scale.parallel.parallelize import parallelize
    from rdm_scale.training.optimizer import build_optimizer

    mesh = build_mesh(config.parallel)
    layout = plan(config, mesh.world_size, None)
    return parallelize(config, mesh, layout, partial(build_optimizer, config.optimizer))


def tensor_bytes(model: Any) -> int:
    """Bytes of all tensors that Python reaches, each storage once."""
    gc.collect()
    found = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    found += [t.grad for t in found if t.is_leaf and t.requires_grad and t.grad is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found if not t.is_meta}.values())


def state_of(config: RunConfig) -> tuple[int, int, int]:
    """(bytes of parameters, gradients and optimizer at the end of a step's backwards, predicted, bucket)."""
    gc.collect()
    before = tensor_bytes(None)
    model = parallel_model(config)
    zero = model.zero
    batches = random_batch(config, model.layout.micro_batch * model.layout.micro_batches).split(
        model.layout.micro_batch
    )
    seen: list[int] = []
    original = type(model._links).wait if model._links is not None else None
    accumulating = zero.accumulating

    def watched() -> Any:
        import contextlib

        @contextlib.contextmanager
        def context() -> Any:
            with accumulating():
                yield
                seen.append(tensor_bytes(model) - before)

        return context()

    zero.accumulating = watched
    for _ in range(2):  # the moments are made in the first step
        model.accumulate(
            batches, lambda b: (b.latents, b.t, b.condition), lambda p, b: (p - b.noise).square().flatten(1).mean(1)
        )
        model.step(1e-4)
    del original
    stage = model.layout.stages[model.mesh.pipeline_rank]
    predicted = stage.state.total - stage.state.average
    model.mesh.leave()
    return seen[-1], predicted, 0


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (2, {"parallel__zero_stage": 0}),
        (2, {"parallel__zero_stage": 1}),
        (4, {"parallel__zero_stage": 2}),
        (2, {"parallel__zero_stage": 3, "parallel__keep_gathered": "never"}),
        (4, {"parallel__zero_stage": 3, "parallel__keep_gathered": "never"}),
        (4, {"parallel__zero_stage": 3, "parallel__keep_gathered": "always"}),
        (4, {"parallel__zero_stage": 3, "train__precision": "bf16", "parallel__keep_gathered": "always"}),
        (8, {"parallel__tensor": 2, "parallel__pipeline": 2, "parallel__keep_gathered": "never"}),
    ],
    ids=str,
)
def test_states_take_what_the_table_says(ranks: RankPool, tmp_path: Path, world: int, changes: dict) -> None:
    config = run_config(tmp_path, "none", **WIDE, **changes)
    for measured, predicted, bucket in ranks.run(world, state_of, config):
        print(
            changes,
            world,
            f"measured {measured / 2**20:.2f} MiB, predicted {predicted / 2**20:.2f} MiB, {measured / predicted:.3f}",
        )
