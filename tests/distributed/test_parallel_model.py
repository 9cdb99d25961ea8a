"""Contract of ParallelModel on two ranks: EMA weights, state for checkpoints, recorded gradients, overlap."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from rdm_scale.batch import TrainingBatch
from rdm_scale.config import RunConfig
from rdm_scale.diffusion import build_objective
from tests.support.rank_pool import RankPool
from tests.support.small_runs import run_config

LAYOUTS = [
    {"parallel__pipeline": 2, "parallel__zero_stage": 1},
    {"parallel__zero_stage": 3, "parallel__keep_gathered": "never"},
    {"parallel__zero_stage": 3, "parallel__keep_gathered": "always"},
]


def batch_of(config: RunConfig, samples: int, seed: int) -> TrainingBatch:
    size, generator = config.model.input, torch.Generator().manual_seed(seed)
    shape = (samples, size.channels, size.frames, size.height, size.width)
    latents, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    numbers = torch.arange(samples)
    return TrainingBatch(0, numbers, numbers, latents, noise, torch.rand(samples, generator=generator), numbers % 4)


def use_model(config: RunConfig) -> tuple[list[int], float, float]:
    """Run on each rank: return its blocks, the norm of their gradients and that of all gradients."""
    from rdm_scale.parallel.mesh import build_mesh
    from rdm_scale.parallel.parallelize import parallelize
    from rdm_scale.parallel.plan import plan_parallelism
    from rdm_scale.training.optimizer import build_optimizer

    mesh = build_mesh(config.parallel)
    plan = plan_parallelism(config, mesh.world_size, None)
    model = parallelize(config, mesh, plan, partial(build_optimizer, config.optimizer, config.model))
    objective = build_objective(config.diffusion, False)
    batch = batch_of(config, plan.micro_batch * plan.micro_batches, mesh.data_rank)

    def train(lr: float = 1e-2) -> float:
        model.accumulate(batch.split(plan.micro_batch), objective)
        return model.step(lr).item()

    def predict(*, ema: bool = False) -> torch.Tensor:
        with model.evaluating(ema=ema):
            return model(*objective.model_inputs(batch)).clone()

    def copies() -> list[list[torch.Tensor]]:
        return [[flat.clone() for flat in flats] for flats in model.state()]

    for _ in range(3):  # in the first step only the head has a gradient
        with model.recording_gradients() as squares:
            norm = train()
    before, predicted, averaged = copies(), predict(), predict(ema=True)
    assert not torch.equal(predicted, averaged), "the EMA weights are still the initial ones"
    assert torch.equal(predict(), predicted), "the weights come back after an evaluation with others"

    model.update_ema(0.75)
    for ema, old, weights in zip(model.state().ema, before[3], before[0], strict=True):
        torch.testing.assert_close(ema, 0.75 * old + 0.25 * weights)

    train()
    assert not torch.equal(predict(), predicted)
    with model.restoring(3) as state:
        for flats, kept in zip(state, before, strict=True):
            torch._foreach_copy_(flats, kept)
    assert torch.equal(predict(), predicted) and torch.equal(predict(ema=True), averaged)

    blocks_norm = math.sqrt(mesh.all_reduce_sum([float(sum(squares.values()))])[0]) * model.clip_factor(norm)
    mesh.shutdown()
    return sorted(model.blocks), blocks_norm, norm


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parallel_model_contract(ranks: RankPool, tmp_path: Path, layout: dict) -> None:
    config = run_config(tmp_path, "none", **layout, train__micro_batch_size=2, optimizer__grad_clip=0.01)
    results = ranks.run(2, use_model, config)
    pipelined = "parallel__pipeline" in layout
    held = [block for blocks, _, _ in results for block in blocks]
    assert sorted(held) == ([0, 1, 2] if pipelined else [0, 0, 1, 1, 2, 2])
    for _, blocks_norm, norm in results:
        assert 0.1 * norm < blocks_norm < norm


class GroupwiseAdam(torch.optim.Optimizer):
    """AdamW that counts steps as apex's FusedAdam does: in each group, from the first step on."""

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (first, second), count = group["betas"], group["step"]
            for weights in (each for each in group["params"] if each.grad is not None):
                state, gradient = self.state[weights], weights.grad
                mean = state.setdefault("exp_avg", torch.zeros_like(gradient)).lerp_(gradient, 1 - first)
                square = state.setdefault("exp_avg_sq", torch.zeros_like(gradient)).lerp_(gradient**2, 1 - second)
                scale = (square / (1 - second**count)).sqrt() + group["eps"]
                weights.data.mul_(1 - group["lr"] * group["weight_decay"])
                weights.data.addcdiv_(mean, scale, value=-group["lr"] / (1 - first**count))


def use_optimizers(config: RunConfig) -> list[tuple[dict[int, float], list[float]]]:
    """Run on each rank: with torch's and with the other optimizer, a step's squares and the weights after a resume."""
    from rdm_scale.parallel.mesh import build_mesh
    from rdm_scale.parallel.parallelize import parallelize
    from rdm_scale.parallel.plan import plan_parallelism
    from rdm_scale.training.optimizer import build_optimizer

    def groupwise(model: torch.nn.Module) -> torch.optim.Optimizer:
        adam = build_optimizer(config.optimizer, config.model, model)
        return GroupwiseAdam(adam.param_groups, adam.defaults)

    mesh = build_mesh(config.parallel)
    plan = plan_parallelism(config, mesh.world_size, None)
    objective = build_objective(config.diffusion, False)
    batch = batch_of(config, plan.micro_batch * plan.micro_batches, mesh.data_rank)
    found = []
    for build in (partial(build_optimizer, config.optimizer, config.model), groupwise):
        model = parallelize(config, mesh, plan, build)
        for _ in range(3):
            with model.recording_gradients() as squares:
                model.accumulate(batch.split(plan.micro_batch), objective)
                model.step(1e-2)
        kept = [[flat.clone() for flat in flats] for flats in model.state()]
        model = parallelize(config, mesh, plan, build)
        with model.restoring(3) as state:
            for flats, values in zip(state, kept, strict=True):
                torch._foreach_copy_(flats, values)
        model.accumulate(batch.split(plan.micro_batch), objective)
        model.step(1e-2)
        weights = torch.cat(model.state().weights).tolist()
        found.append(({block: float(square) for block, square in squares.items()}, weights))
    mesh.shutdown()
    return found


def test_an_optimizer_that_counts_by_group_trains_the_same(ranks: RankPool, tmp_path: Path) -> None:
    """It divides gradients beforehand and has no count of its own after a resume."""
    changes = {"train__micro_batch_size": 2, "optimizer__grad_clip": 0.01, "parallel__keep_gathered": "always"}
    config = run_config(tmp_path, "none", **changes)
    for (squares, weights), (other_squares, other_weights) in ranks.run(2, use_optimizers, config):
        assert squares and other_squares == pytest.approx(squares, rel=1e-3)
        assert other_weights == pytest.approx(weights, rel=1e-3, abs=1e-5)


def watch_collectives(config: RunConfig) -> tuple[list[str], bool]:
    """Run on each rank: list a step's actions and background jobs, and tell whether reduced gradients are bf16."""
    from rdm_scale.parallel.zero.background import Background, Wait
    from tests.distributed.test_memory import parallel_model

    events: list[str] = []
    start = Background.start

    def recorded(self: Background, job: Callable[[], None]) -> Wait:
        events.append("job")
        return start(self, job)

    Background.start = recorded  # type: ignore[method-assign]
    model = parallel_model(config)
    model.on_action = lambda action: events.append(action.kind.value if action else "end")
    objective = build_objective(config.diffusion, False)
    batch = batch_of(config, 4, model.mesh.data_rank)
    model.accumulate(batch.split(2), objective)
    model.step(1e-2)
    events.clear()
    model.accumulate(batch.split(2), objective)
    tensors = model.tensors_by_kind()["gradients"]  # the unsharded ones, then the shards
    reduced = torch.cat(tensors[len(tensors) // 2 :])
    model.mesh.shutdown()
    return events, torch.equal(reduced, reduced.bfloat16().float())


@pytest.mark.parametrize(("overlap", "dtype"), [(True, "bf16"), (False, "fp32")])
def test_collectives_start_beside_the_computation(ranks: RankPool, tmp_path: Path, overlap: bool, dtype: str) -> None:
    """Three blocks are a bucket each, and what is outside of them another one."""
    changes = {"parallel__overlap": overlap, "parallel__reduce_dtype": dtype, "train__micro_batch_size": 2}
    config = run_config(tmp_path, "none", **changes, parallel__keep_gathered="always", train__global_batch_size=8)
    first, last = ["forward", "backward", "forward", "backward"], ["end"]
    jobs = [["job"] * 4, first, ["job"] * 3, last, ["job"]] if overlap else [["job"], first, last, ["job"]]
    for events, rounded in ranks.run(2, watch_collectives, config):
        assert events == [event for part in jobs for event in part]
        assert rounded == (dtype == "bf16")
