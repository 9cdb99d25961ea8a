"""CUDA graphs on the CPU: what is recorded, replayed and refused, with a recording that replays by calling again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rdm_scale.batch import TrainingBatch
from rdm_scale.errors import ConfigError
from rdm_scale.parallel import cuda_graphs
from rdm_scale.parallel.cuda_graphs import MicroBatchGraphs, Recording, obstacle, wants_graphs
from rdm_scale.parallel.plan import plan_parallelism
from tests.support.rank_pool import RankPool
from tests.support.small_runs import metrics, run_config, train, write_latents


def call_again(body: Any, pool: Any) -> Recording:
    """Stand-in for cuda_graphs.record: a replay calls the body again, into the same tensor of losses."""
    losses = body()
    return Recording(lambda: losses.copy_(body()), losses)


class Buffers:
    """Engine of one parameter: its gradient buffer, which a backward overwrites or adds to."""

    def __init__(self) -> None:
        self.filled: set[int] = set()
        self.gradient = 0.0

    def discard_gradients(self) -> None:
        self.filled.clear()

    def backward(self, gradient: float) -> None:
        self.gradient = self.gradient + gradient if 0 in self.filled else gradient
        self.filled.add(0)


def batch_of(values: list[float]) -> TrainingBatch:
    x = torch.tensor(values)
    return TrainingBatch(0, torch.arange(len(x)), torch.arange(len(x)), x.view(-1, 1, 1, 1, 1), x, x)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> tuple[MicroBatchGraphs, Buffers, list[str]]:
    monkeypatch.setattr(cuda_graphs, "record", call_again)
    buffers, lines = Buffers(), []
    return MicroBatchGraphs(buffers, 2, lines.append, demanded=False), buffers, lines


def test_replays_read_their_batch_and_accumulate(graphs: tuple[MicroBatchGraphs, Buffers, list[str]]) -> None:
    recorded, buffers, _ = graphs
    calls = []

    def body(batch: TrainingBatch) -> Tensor:
        calls.append(batch.latents.data_ptr())
        buffers.backward(float(batch.latents.sum()))
        return batch.latents.flatten() * 2

    for step in range(3):
        buffers.filled.clear()
        values = [[1.0 + step, 2.0], [10.0, 20.0], [100.0, 200.0]]
        losses = recorded.run([batch_of(v) for v in values], body)
        assert losses is not None and [loss.tolist() for loss in losses] == [[2 * x for x in v] for v in values]
        assert buffers.gradient == sum(map(sum, values)) and buffers.filled == {0}
    assert len(set(calls)) == 2, "each graph reads its own fixed tensors"


def test_shapes_beyond_the_limit_run_without(graphs: tuple[MicroBatchGraphs, Buffers, list[str]]) -> None:
    recorded, _, lines = graphs
    body = lambda batch: batch.latents.flatten()  # noqa: E731
    found = [recorded.run([batch_of([0.0] * n)], body) for n in (1, 2, 3, 4, 2)]
    assert [losses is not None for losses in found] == [True, True, False, False, True]
    assert sum("no further shape" in line for line in lines) == 1


def test_a_failed_recording_is_reported_and_leaves_nothing(
    graphs: tuple[MicroBatchGraphs, Buffers, list[str]],
) -> None:
    recorded, buffers, lines = graphs

    def body(batch: TrainingBatch) -> Tensor:
        buffers.backward(1.0)
        raise RuntimeError("operation not permitted when stream is capturing")

    assert recorded.run([batch_of([1.0])], body) is None
    assert "not permitted" in lines[-1] and not buffers.filled
    with pytest.raises(RuntimeError, match="not permitted"):
        MicroBatchGraphs(buffers, 2, lines.append, demanded=True).run([batch_of([1.0])], body)


def steps_with_stand_in(config: Any) -> None:
    """Train on a rank whose recordings call again, on the CPU."""
    cuda_graphs.record = call_again
    cuda_graphs.DEVICES = ("cpu",)
    train(config)


def test_training_is_the_same(ranks: RankPool, tmp_path: Path) -> None:
    data = write_latents(tmp_path / "data")
    found = []
    for graphs in (False, True):
        changes = {"train__steps": 3, "train__micro_batch_size": 2, "parallel__overlap": False}
        changes |= {"train__cuda_graphs": graphs, "monitor__depth_every": 2}
        config = run_config(tmp_path / str(graphs), data, **changes)
        ranks.run(2, steps_with_stand_in, config)
        found.append(metrics(config.run.dir))
    assert found[0] == found[1]


class Gpu:
    device = torch.device("cuda")
    pipeline_rank, data_size = 0, 1


def test_obstacles_are_named(tmp_path: Path) -> None:
    def why(memory: float | None = None, **changes: Any) -> str:
        config = run_config(tmp_path, "none", **changes)
        world = config.parallel.tensor * config.parallel.pipeline
        return obstacle(config, Gpu(), plan_parallelism(config, world, memory)) or ""  # type: ignore[arg-type]

    assert why() == ""
    assert "zero_stage=3" in why(parallel__zero_stage=1) and "zero_stage=3" in why(parallel__keep_gathered="never")
    assert "pipeline" in why(parallel__pipeline=2) and "pipeline" in why(parallel__tensor=2)
    gathered = {"parallel__keep_gathered": "always"}
    assert "twice" in why(memory=2**20, **gathered) and why(memory=2**40, **gathered) == ""


def test_graphs_can_be_demanded(tmp_path: Path) -> None:
    plain, lines = run_config(tmp_path, "none"), []
    plan = plan_parallelism(plain, 1, None)
    assert wants_graphs(plain, Gpu(), plan, lines.append)  # type: ignore[arg-type]
    blocked = run_config(tmp_path, "none", parallel__zero_stage=1)
    plan = plan_parallelism(blocked, 1, None)
    assert not wants_graphs(blocked, Gpu(), plan, lines.append) and "CUDA graphs: no" in lines[-1]  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cuda_graphs=true"):
        demanded = run_config(tmp_path, "none", parallel__zero_stage=1, train__cuda_graphs=True)
        wants_graphs(demanded, Gpu(), plan, lines.append)  # type: ignore[arg-type]
