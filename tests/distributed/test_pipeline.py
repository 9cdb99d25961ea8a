"""The pipeline executor with a toy model: local skips, changing shapes, early messages."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from rdm_scale.config import ParallelConfig
from rdm_scale.parallel.pipeline.boundary import BoundarySpec, BoundaryTensors, StageInputs, Tensors, TensorSpec
from rdm_scale.parallel.pipeline.channels import Channels
from rdm_scale.parallel.pipeline.executor import ChunkOutputs, Pipeline
from rdm_scale.parallel.pipeline.schedules import Action, build_schedule, place_chunks
from tests.support.rank_pool import RankPool

WIDTH = 3


def weight(chunk: int) -> Tensor:
    return torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(chunk), dtype=torch.float64)


def samples(step: int, micro_batch: int) -> Tensor:
    """Samples, in a number that differs between steps and between micro-batches."""
    generator = torch.Generator().manual_seed(100 * step + micro_batch)
    return torch.randn(1 + (step + micro_batch) % 3, WIDTH, generator=generator, dtype=torch.float64)


def condition(chunk: int) -> Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(50 + chunk), dtype=torch.float64)


class ToyChunks:
    """Chunk k maps x to tanh(x W_k) + c, where the first chunk makes the condition c, which every chunk passes on.

    With `skips`, the V-placement partner of a chunk adds the square of twice that chunk's output.
    """

    def __init__(self, chunks: list[int], count: int, skips: bool) -> None:
        self.weights = {k: weight(k).requires_grad_() for k in chunks}
        self.condition = condition(0).requires_grad_()
        self.count, self.skips, self.step = count, skips, 0

    def forward(self, chunk: int, micro_batch: int, inputs: StageInputs) -> ChunkOutputs:
        x, c = inputs.boundary or (samples(self.step, micro_batch), self.condition.exp())
        y = torch.tanh(x @ self.weights[chunk]) + c
        for skip in inputs.local_skips:
            y = y + skip * skip
        if chunk == self.count - 1:
            return ChunkOutputs(loss=y.square().sum())
        skips = (2 * y,) if self.skips and chunk < self.count // 2 else ()
        return ChunkOutputs(BoundaryTensors(y, c.view_as(c)), skips)

    def backward(self, micro_batch: int, outputs: Tensors, gradients: tuple[Tensor | None, ...]) -> None:
        torch.autograd.backward(outputs, gradients)

    def boundary_spec(self, micro_batch: int) -> BoundarySpec:
        shape = tuple(samples(self.step, micro_batch).shape)
        return BoundarySpec(TensorSpec(shape, torch.float64), TensorSpec((WIDTH,), torch.float64))

    def gradients(self) -> dict[str, list]:
        """Gradients of this rank's parameters, by name."""
        named = {f"W{k}": w for k, w in self.weights.items()} | {"c": self.condition}
        return {name: p.grad.tolist() for name, p in named.items() if p.grad is not None}


def alone(count: int, skips: bool, micro_batches: int, steps: int) -> dict[str, Tensor]:
    weights = [weight(k).requires_grad_() for k in range(count)]
    c = condition(0).requires_grad_()
    for step in range(steps):
        for micro_batch in range(micro_batches):
            outs: list[Tensor] = []
            x = samples(step, micro_batch)
            for k in range(count):
                x = torch.tanh(x @ weights[k]) + c.exp()
                if skips and k >= count // 2:
                    x = x + (2 * outs[count - 1 - k]) ** 2
                outs.append(x)
            x.square().sum().backward()
    return {f"W{k}": w.grad for k, w in enumerate(weights) if w.grad is not None} | {"c": c.grad}


def run_toy(schedule: str, ranks: int, chunks: int, micro_batches: int, skips: bool) -> tuple[dict[str, list], bool]:
    """Run on each rank: return its gradients after two steps, and True if the hook saw all actions in order."""
    from rdm_scale.parallel.mesh import build_mesh

    mesh = build_mesh(ParallelConfig(pipeline=ranks, schedule=schedule, timeout_s=300))  # type: ignore[arg-type]
    placement = place_chunks(schedule, ranks, chunks)
    toy = ToyChunks(placement.chunks_of(mesh.pipeline_rank), placement.chunks, skips)
    channels = Channels(mesh) if ranks > 1 else None
    actions = build_schedule(schedule, placement, micro_batches)
    pipeline = Pipeline(placement, actions, mesh.pipeline_rank, channels)
    seen: list[Action | None] = []
    pipeline.on_action = seen.append
    for step in range(2):
        toy.step = step
        pipeline.run(toy)
    mesh.shutdown()
    return toy.gradients(), seen == [*actions[mesh.pipeline_rank], None] * 2


@pytest.mark.parametrize(
    ("schedule", "ranks_used", "chunks", "micro_batches", "skips"),
    [
        ("1f1b", 1, 1, 3, False),
        ("1f1b", 4, 1, 2, False),
        ("1f1b", 3, 1, 7, False),
        ("interleaved_1f1b", 2, 3, 4, False),
        ("interleaved_1f1b", 4, 2, 8, False),
        ("v_1f1b", 2, 2, 5, True),
        ("v_1f1b", 2, 2, 6, True),  # here and below some messages arrive before they are needed
        ("v_1f1b", 4, 2, 8, True),
    ],
)
def test_gradients_are_those_of_one_process(
    ranks: RankPool, schedule: str, ranks_used: int, chunks: int, micro_batches: int, skips: bool
) -> None:
    found: dict[str, list] = {}
    for gradients, hook_was_called in ranks.run(
        ranks_used, run_toy, schedule, ranks_used, chunks, micro_batches, skips
    ):
        found |= gradients
        assert hook_was_called
    expected = alone(ranks_used * chunks, skips, micro_batches, steps=2)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(torch.tensor(found[name], dtype=torch.float64), gradient, rtol=1e-12, atol=0), name


def raise_on_one_rank() -> Any:
    """A chunk that fails on rank 1 while the others wait for its messages."""
    from rdm_scale.parallel.mesh import build_mesh

    mesh = build_mesh(ParallelConfig(pipeline=3, timeout_s=300))
    placement = place_chunks("1f1b", 3, 1)
    toy = ToyChunks(placement.chunks_of(mesh.pipeline_rank), 3, False)
    if os.environ["RANK"] == "1":
        toy.weights = {}
    Pipeline(placement, build_schedule("1f1b", placement, 4), mesh.pipeline_rank, Channels(mesh)).run(toy)


def test_the_error_of_the_failing_rank_is_raised(ranks: RankPool) -> None:
    with pytest.raises(KeyError):
        ranks.run(3, raise_on_one_rank)
