"""Reports of a run on a GPU: its rates against a measured peak, traces, and what is left of a collective that hangs."""

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest

from rdm_scale.batch import TrainingBatch
from rdm_scale.config import RunConfig
from tests.support.rank_pool import RankPool
from tests.support.small_runs import run_config, train, write_latents

pytestmark = pytest.mark.gpu


def test_rates_and_a_trace(tmp_path: Path) -> None:
    config = run_config(tmp_path, write_latents(tmp_path / "latents"), train__steps=5, train__profile=[3, 4])
    RankPool(gpu=True).run(1, train, config)
    records = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert all(0 < record["mfu"] < 1 and record["step_s"] > 0 for record in records)
    (trace,) = (Path(config.run.dir) / "profile").iterdir()
    events: list[dict[str, Any]] = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)


def train_until_a_rank_hangs(config: RunConfig) -> None:
    from rdm_scale.training.trainer import Trainer

    train_step = Trainer.train_step

    def hang(batch: TrainingBatch) -> None:
        time.sleep(1000)

    def faulty_step(self: Any, batches: Any) -> Any:
        if self.step == 2 and self.mesh.rank == 1:
            self.objective.model_inputs = hang
        return train_step(self, batches)

    Trainer.train_step = faulty_step  # type: ignore[method-assign]
    train(config)


def test_a_hanging_collective_leaves_stacks_and_the_last_collectives(tmp_path: Path) -> None:
    config = run_config(tmp_path, write_latents(tmp_path / "latents"), parallel__timeout_s=30)
    with pytest.raises((RuntimeError, TimeoutError)):
        RankPool(gpu=True).run(2, train_until_a_rank_hangs, config)
    folder = Path(config.run.dir) / "hangs"
    assert (folder / "collectives_rank_0").stat().st_size
    stacks = [(folder / f"stacks_rank_{rank:05d}.txt").read_text() for rank in range(2)]
    assert all(stacks) and ["in hang\n" in text for text in stacks] == [False, True]
