"""Compiled blocks on layouts of many ranks: one graph for each kind, no breaks, and the numbers of eager blocks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rdm_scale.config import RunConfig
from rdm_scale.parallel import compile
from tests.support.layouts import Case
from tests.support.rank_pool import RankPool
from tests.support.small_runs import metrics, run_config, train, write_latents

U = {"model__stacking": "u", "model__depth": 5, "model__qk_norm": True}
BF16 = {"train__precision": "bf16"}
# Layout, changes of the model, graphs on a rank.
CASES: list[tuple[Case, dict[str, Any], int]] = [
    (Case(1, 1, 2, "3 kept", "1f1b", "selective", False), BF16, 1),
    (Case(1, 1, 2, "3 by block", "1f1b", "full", False), BF16, 1),
    (Case(1, 1, 2, "2", "1f1b", "every_2", False), BF16, 2),
    (Case(1, 2, 1, "1", "v_1f1b", "none", False), U, 2),
    (Case(2, 1, 1, "3 by block", "1f1b", "selective", True), U, 2),
    (Case(2, 1, 1, "0", "1f1b", "full", False), U, 2),
]


def compiled_graphs(config: RunConfig, backend: str) -> tuple[int, dict[str, int]]:
    """Train on a rank, and count its graphs and breaks."""
    from torch._dynamo.utils import counters

    compile.backend = backend
    train(config)
    return counters["stats"]["unique_graphs"], dict(counters["graph_break"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_latents(tmp_path_factory.mktemp("latents"))


def configs(case: Case, changes: dict[str, Any], data: str, tmp_path: Path) -> Callable[[bool], RunConfig]:
    small = case.changes() | {"model__depth": 3, "train__steps": 2, "monitor__depth_every": 0} | changes
    return lambda on: run_config(tmp_path / str(on), data, **small, train__compile=on)


@pytest.mark.parametrize(("case", "changes", "graphs"), CASES, ids=[str(case) for case, *_ in CASES])
def test_layout(case: Case, changes: dict[str, Any], graphs: int, data: str, ranks: RankPool, tmp_path: Path) -> None:
    config = configs(case, changes, data, tmp_path)
    ranks.run(case.world, train, config(False))
    found = ranks.run(case.world, compiled_graphs, config(True), "aot_eager")
    assert [breaks for _, breaks in found] == [{}] * case.world
    assert max(count for count, _ in found) == graphs
    for eager, other in zip(metrics(config(False).run.dir), metrics(config(True).run.dir), strict=True):
        assert (other["loss"], other["grad_norm"]) == pytest.approx((eager["loss"], eager["grad_norm"]), rel=1e-5)


def test_a_resumed_run_repeats_bit_for_bit(data: str, ranks: RankPool, tmp_path: Path) -> None:
    """With generated code, and with steps on the way that the depth probe runs eagerly."""
    same = {"train__compile": True, "model__depth": 2, "monitor__depth_every": 2, "train__global_batch_size": 4}
    whole = run_config(tmp_path / "whole", data, **same, train__steps=4)
    ranks.run(1, train, whole)
    for steps in (3, 4):
        ranks.run(1, train, run_config(tmp_path / "parts", data, **same, train__steps=steps))
    assert metrics(tmp_path / "parts" / "run") == metrics(whole.run.dir)
