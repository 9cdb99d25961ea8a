"""Memory on real ranks compared with the plan: model state in training, and the peak during start-up."""

import gc
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from rdm_scale.batch import TrainingBatch
from rdm_scale.config import RunConfig
from rdm_scale.diffusion import build_objective
from tests.support.rank_pool import RankPool
from tests.support.small_runs import run_config

if TYPE_CHECKING:
    from rdm_scale.parallel.parallel_model import ParallelModel

WIDE = {"model__hidden_size": 256, "model__depth": 8, "model__num_heads": 4, "train__global_batch_size": 8}


def random_batch(config: RunConfig, samples: int) -> TrainingBatch:
    size = config.model.input
    latents = torch.randn(samples, size.channels, size.frames, size.height, size.width)
    numbers = torch.arange(samples)
    return TrainingBatch(0, numbers, numbers, latents, torch.randn_like(latents), torch.rand(samples), numbers % 4)


def parallel_model(config: RunConfig) -> "ParallelModel":
    from rdm_scale.parallel.mesh import build_mesh
    from rdm_scale.parallel.parallelize import parallelize
    from rdm_scale.parallel.plan import plan_parallelism
    from rdm_scale.training.optimizer import build_optimizer

    mesh = build_mesh(config.parallel)
    layout = plan_parallelism(config, mesh.world_size, None)
    return parallelize(config, mesh, layout, partial(build_optimizer, config.optimizer, config.model))


def tensor_bytes() -> int:
    """Bytes of all tensors that Python can reach, each storage counted once."""
    gc.collect()
    found = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    found += [t.grad for t in found if t.is_leaf and t.requires_grad and t.grad is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found if not t.is_meta}.values())


def state_of(config: RunConfig) -> tuple[int, int, int]:
    """Bytes of parameters, gradients, optimizer and EMA at the end of a step's backwards.

    Returns:
        Measured bytes, planned bytes, and planned bytes of temporary buffers, which DeepSpeed keeps for reductions.
    """
    before, objective = tensor_bytes(), build_objective(config.diffusion, False)
    model = parallel_model(config)
    measured: list[int] = []

    def measure(action: object) -> None:
        if action is None:
            measured.append(tensor_bytes() - before)

    model.on_action = measure
    layout = model.plan
    batches = random_batch(config, layout.micro_batch * layout.micro_batches).split(layout.micro_batch)
    for _ in range(2):  # the optimizer state is made in the first step
        model.accumulate(batches, objective)
        model.step(1e-4)
    stage = layout.stages[model.mesh.pipeline_rank]
    model.mesh.shutdown()
    return measured[-1], stage.state.total, int(stage.working)


def uses_torch_linear(config: RunConfig) -> bool:
    own = torch.nn.functional.linear
    parallel_model(config)
    return torch.nn.functional.linear is own


@pytest.mark.parametrize(("keep_gathered", "expected"), [("always", True), ("never", False)])
def test_torch_linear_is_used_only_with_kept_gathered_parameters(
    ranks: RankPool, tmp_path: Path, keep_gathered: str, expected: bool
) -> None:
    """torch's linear layer is faster, but saves the transpose of an all-gathered weight for its backward."""
    config = run_config(tmp_path, "none", parallel__keep_gathered=keep_gathered)
    assert ranks.run(2, uses_torch_linear, config) == [expected, expected]


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (2, {"parallel__zero_stage": 0}),
        (2, {"parallel__zero_stage": 1}),
        (4, {"parallel__zero_stage": 2}),
        (2, {"parallel__zero_stage": 3, "parallel__keep_gathered": "never"}),
        (4, {"parallel__zero_stage": 3, "parallel__keep_gathered": "never"}),
        (4, {"parallel__zero_stage": 3, "parallel__keep_gathered": "always"}),
        (4, {"parallel__shard_size": 2, "train__precision": "bf16", "parallel__keep_gathered": "always"}),
        (
            2,
            {"parallel__pipeline": 2, "parallel__keep_gathered": "always"},
        ),  # with one data-parallel rank the shard is everything
        (8, {"parallel__tensor": 2, "parallel__pipeline": 2, "parallel__keep_gathered": "never"}),
    ],
    ids=str,
)
def test_model_state_takes_the_planned_memory(ranks: RankPool, tmp_path: Path, world: int, changes: dict) -> None:
    for measured, planned, working in ranks.run(world, state_of, run_config(tmp_path, "none", **WIDE, **changes)):
        print(f"{changes} on {world}: measured {measured / 2**20:.2f} MiB of {planned / 2**20:.2f} MiB planned")
        assert 0.95 * planned < measured < 1.05 * planned + working


def parameters_held_in_backwards(config: RunConfig) -> tuple[int, int]:
    """Largest number of parameters that are all-gathered when a backward enters a block, and those of two blocks."""
    model = parallel_model(config)
    parameters = [p for block in model.blocks.values() for p in block.parameters()]
    of_two_blocks = 2 * sum(1 for _ in model.blocks[min(model.blocks)].parameters())
    held: list[int] = []

    def count(gradient: torch.Tensor) -> None:
        held.append(sum(p.numel() > 0 for p in parameters))

    def watch(block: torch.nn.Module, inputs: tuple) -> None:
        if inputs[0].requires_grad:
            inputs[0].register_hook(count)

    for block in model.blocks.values():
        block.register_forward_pre_hook(watch)
    batches = random_batch(config, model.plan.micro_batch * model.plan.micro_batches).split(model.plan.micro_batch)
    model.accumulate(batches, build_objective(config.diffusion, False))
    model.mesh.shutdown()
    return max(held), of_two_blocks


def test_a_backward_after_two_forwards_frees_each_block(ranks: RankPool, tmp_path: Path) -> None:
    """The first stage runs two forwards before the first backward; DeepSpeed counts for one only."""
    changes = {"parallel__pipeline": 2, "train__micro_batch_size": 1, "parallel__keep_gathered": "never"}
    config = run_config(tmp_path, "none", **WIDE | {"model__hidden_size": 64}, **changes)
    for held, of_two_blocks in ranks.run(4, parameters_held_in_backwards, config):
        assert 0 < held <= of_two_blocks


def peak_of_building(config: RunConfig) -> tuple[float, float]:
    """Peak of resident bytes while the model is built, in addition to the empty process: measured and planned."""
    import torch.distributed as dist

    from rdm_scale import cost

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
    empty = _resident("VmRSS")
    model = parallel_model(config)
    built = _resident("VmHWM") - empty
    stage = model.plan.stages[model.mesh.pipeline_rank]
    block = 4 * cost.block_parameters(config.model).on_rank(config.parallel.tensor)
    dist.barrier()
    model.mesh.shutdown()
    return built, stage.state.total + block


def _resident(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@pytest.mark.full
@pytest.mark.timeout(900)
def test_no_rank_holds_more_than_its_share_and_a_block_during_start_up(ranks: RankPool, tmp_path: Path) -> None:
    """Half a billion parameters on eight ranks."""
    changes = {"model__hidden_size": 1024, "model__depth": 26, "model__num_heads": 16, "parallel__tensor": 2}
    config = run_config(tmp_path, "none", **changes, parallel__pipeline=2, parallel__keep_gathered="never")
    for built, planned in ranks.run(8, peak_of_building, config):
        print(f"peak {built / 2**20:.0f} MiB beyond the empty process, share and a block {planned / 2**20:.0f} MiB")
        assert built < planned
