"""The pipeline itself, with a toy model: tensors that stay on a rank, shapes that change, early messages."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from rdm_scale.config import ParallelConfig
from rdm_scale.parallel.pipeline.executor import Links, Outputs, Pipeline, Shapes, Tensors
from rdm_scale.parallel.pipeline.schedules import operations, placement
from tests.support.rank_pool import RankPool

WIDTH = 3


def weight(chunk: int) -> Tensor:
    return torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(chunk), dtype=torch.float64)


def samples(step: int, micro_batch: int) -> Tensor:
    """Of another number in every step and micro-batch."""
    generator = torch.Generator().manual_seed(100 * step + micro_batch)
    return torch.randn(1 + (step + micro_batch) % 3, WIDTH, generator=generator, dtype=torch.float64)


class ToyChunks:
    """Chunk k maps x to tanh(x W_k); under `u`, the mirror of a chunk adds what that chunk has put out."""

    def __init__(self, chunks: list[int], count: int, u: bool) -> None:
        self.weights = {k: weight(k).requires_grad_() for k in chunks}
        self.count, self.u, self.step = count, u, 0
        self.loss = 0.0

    def forward(self, chunk: int, micro_batch: int, inputs: Tensors) -> Outputs:
        x, *skips = inputs if chunk else (samples(self.step, micro_batch),)
        y = torch.tanh(x @ self.weights[chunk])
        for skip in skips:
            y = y + skip * skip
        if chunk == self.count - 1:
            self.loss += float(y.detach().square().sum())
            return Outputs((y.square().sum(),))
        return Outputs((y,), (2 * y,) if self.u and chunk < self.count // 2 else ())

    def backward(self, outputs: Tensors, gradients: tuple[Tensor | None, ...]) -> None:
        torch.autograd.backward(outputs, gradients)

    def shapes(self, micro_batch: int) -> Shapes:
        return [(tuple(samples(self.step, micro_batch).shape), torch.float64)]


def alone(count: int, u: bool, micro_batches: int, steps: int) -> dict[int, Tensor]:
    weights = {k: weight(k).requires_grad_() for k in range(count)}
    for step in range(steps):
        for micro_batch in range(micro_batches):
            outs: list[Tensor] = []
            x = samples(step, micro_batch)
            for k in range(count):
                x = torch.tanh(x @ weights[k])
                if u and k >= count // 2:
                    x = x + (2 * outs[count - 1 - k]) ** 2
                outs.append(x)
            x.square().sum().backward()
    return {k: w.grad for k, w in weights.items() if w.grad is not None}


def run_toy(schedule: str, ranks: int, chunks: int, micro_batches: int, u: bool) -> dict[int, list]:
    from rdm_scale.parallel.mesh import build_mesh

    mesh = build_mesh(ParallelConfig(pipeline=ranks, schedule=schedule, timeout_s=30))  # type: ignore[arg-type]
    place = placement(schedule, ranks, chunks)
    toy = ToyChunks(place.chunks_of(mesh.pipeline_rank), place.chunks, u)
    links = Links(mesh) if ranks > 1 else None
    pipeline = Pipeline(place, operations(schedule, place, micro_batches), mesh.pipeline_rank, links)
    for step in range(2):
        toy.step = step
        pipeline.run(toy)
    mesh.shutdown()
    return {k: w.grad.tolist() for k, w in toy.weights.items() if w.grad is not None}


@pytest.mark.parametrize(
    ("schedule", "ranks_used", "chunks", "micro_batches", "u"),
    [
        ("1f1b", 1, 1, 3, False),
        ("1f1b", 4, 1, 2, False),
        ("1f1b", 3, 1, 7, False),
        ("interleaved_1f1b", 2, 3, 4, False),
        ("interleaved_1f1b", 4, 2, 8, False),
        ("v_1f1b", 2, 2, 5, True),
        ("v_1f1b", 2, 2, 6, True),  # here and below some messages arrive before they are wanted
        ("v_1f1b", 4, 2, 8, True),
    ],
)
def test_gradients_are_those_of_one_process(
    ranks: RankPool, schedule: str, ranks_used: int, chunks: int, micro_batches: int, u: bool
) -> None:
    found: dict[int, list] = {}
    for part in ranks.run(ranks_used, run_toy, schedule, ranks_used, chunks, micro_batches, u):
        found |= part
    expected = alone(ranks_used * chunks, u, micro_batches, steps=2)
    assert found.keys() == expected.keys()
    for chunk, gradient in expected.items():
        assert torch.allclose(torch.tensor(found[chunk], dtype=torch.float64), gradient, rtol=1e-12, atol=0), chunk


def raise_on_one_rank() -> Any:
    """A chunk that fails on rank 1 while the others wait for its messages."""
    from rdm_scale.parallel.mesh import build_mesh

    mesh = build_mesh(ParallelConfig(pipeline=3, timeout_s=30))
    place = placement("1f1b", 3, 1)
    toy = ToyChunks(place.chunks_of(mesh.pipeline_rank), 3, False)
    if os.environ["RANK"] == "1":
        toy.weights = {}
    Pipeline(place, operations("1f1b", place, 4), mesh.pipeline_rank, Links(mesh)).run(toy)


def test_the_first_error_is_the_one_that_counts(ranks: RankPool) -> None:
    with pytest.raises(KeyError):
        ranks.run(3, raise_on_one_rank)
