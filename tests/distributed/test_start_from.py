"""A run that starts with given weights: under any layout they are those given, and the same command goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rdm_scale.checkpoint import load_model
from rdm_scale.checkpoint.convert.merge import merge
from rdm_scale.checkpoint.model_source import open_model
from rdm_scale.errors import CheckpointError
from rdm_scale.storage.location import Location
from tests.support.rank_pool import RankPool
from tests.support.small_runs import metrics, run_config, train, write_latents

# A step with this learning rate changes no weight in fp32 but 0, which becomes 1e-30: what is saved is what was loaded.
STILL: dict[str, Any] = {"optimizer__lr": 1e-30, "optimizer__warmup_steps": 0, "train__steps": 1}


@pytest.fixture(scope="module")
def source(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of 3 steps, whose EMA weights differ from its weights, and of its latents."""
    here = tmp_path_factory.mktemp("source")
    ranks.run(1, train, run_config(here, write_latents(here / "latents"), train__steps=3))
    return here


def weights_of(path: Path, weights: str) -> dict[str, torch.Tensor]:
    return dict(load_model(str(path), weights).named_parameters())  # type: ignore[arg-type]


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if (found[name] - expected[name]).abs().max() > 2e-30] == []


def test_a_run_starts_with_the_ema_weights_of_another_and_goes_on_by_itself(
    ranks: RankPool, source: Path, tmp_path: Path
) -> None:
    other = write_latents(tmp_path / "other", samples=40, seed=5)
    start = {"checkpoint__start_from": str(source / "run"), "train__seed": 17}
    layout = {"parallel__tensor": 2, "parallel__zero_stage": 3}
    ranks.run(4, train, run_config(tmp_path, other, **STILL, **start, **layout))
    ema = weights_of(source / "run", "ema")
    assert_equal(weights_of(tmp_path / "run", "raw"), ema)
    assert_equal(weights_of(tmp_path / "run", "ema"), ema)
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1]

    state = json.loads((tmp_path / "run/checkpoints/step_00000001/state.json").read_text())
    step_3 = str(source / "run/checkpoints/step_00000003")
    assert state["started_from"] == {"given": str(source / "run"), "path": step_3, "step": 3, "loaded": "ema"}
    assert not any("start_from" in key for key in state["identity"])

    ranks.run(1, train, run_config(tmp_path, other, **(STILL | start | {"train__steps": 2})))
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2]
    again = json.loads((tmp_path / "run/checkpoints/step_00000002/state.json").read_text())
    assert again["started_from"] == state["started_from"]


def test_a_run_starts_with_raw_or_merged_weights(ranks: RankPool, source: Path, tmp_path: Path) -> None:
    latents = str(source / "latents/manifest.json")
    start: dict[str, Any] = {"checkpoint__start_from": str(source / "run"), "checkpoint__start_weights": "raw"}
    ranks.run(1, train, run_config(tmp_path / "raw", latents, **STILL, **start))
    raw = weights_of(source / "run", "raw")
    assert_equal(weights_of(tmp_path / "raw/run", "raw"), raw)
    assert_equal(weights_of(tmp_path / "raw/run", "ema"), raw)

    merge([open_model(str(source / "run"), "raw")], Location(tmp_path / "merged"))
    start = {"checkpoint__start_from": str(tmp_path / "merged")}
    layout = {"parallel__pipeline": 2, "parallel__zero_stage": 1}
    ranks.run(4, train, run_config(tmp_path / "of_merged", latents, **STILL, **start, **layout))
    assert_equal(weights_of(tmp_path / "of_merged/run", "raw"), raw)

    with pytest.raises(CheckpointError, match=r"(?s)other tensors:.*model.depth: 3 in the weights, 4 in the conf"):
        ranks.run(1, train, run_config(tmp_path / "deeper", latents, **STILL, **start, model__depth=4))
    assert not (tmp_path / "deeper/run").exists()
