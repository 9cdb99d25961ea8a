"""Compiled blocks and CUDA graphs on a GPU train what plain blocks train; graphs change no bit."""

from pathlib import Path
from typing import Any

import pytest

from tests.gpu.test_layouts_on_gpu import SMALL, run
from tests.support.layouts import Case
from tests.support.small_runs import metrics, run_config, write_latents

pytestmark = pytest.mark.gpu
KEPT = Case(1, 1, 1, "3 kept", "1f1b", "none", False).changes() | SMALL
CLIPS = {"model__input": {"channels": 4, "frames": 4, "height": 8, "width": 8}, "model__patch_size": [1, 4, 4]}


def values(config: Any) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in metrics(config.run.dir)]


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_compiled_blocks_train_the_same(recompute: str, tmp_path: Path) -> None:
    data = write_latents(tmp_path / "data")
    same = KEPT | {"parallel__recompute": recompute, "train__cuda_graphs": False}
    configs = [run_config(tmp_path / str(on), data, **same, train__compile=on) for on in (False, True)]
    run(1, configs)
    for one, other in zip(*map(values, configs), strict=True):
        assert other == pytest.approx(one, rel=1e-4)  # products there round their inputs to 10 bits


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graphs_change_no_bit(precision: str, compiled: bool, tmp_path: Path) -> None:
    """With three micro-batches a step, of two shapes, and a step that the depth probe runs without graphs."""
    data = [{"path": write_latents(tmp_path / f"data_{size}", size=(1, size, size))} for size in (8, 4)]
    same = KEPT | {"train__deterministic": True, "train__precision": precision, "train__compile": compiled}
    same |= {"monitor__depth_every": 3, "train__steps": 8}
    configs = [run_config(tmp_path / str(on), data, **same, train__cuda_graphs=on) for on in (False, True)]
    run(1, configs)
    assert values(configs[0]) == values(configs[1])


def test_graphs_of_a_factorized_model_of_the_ddpm_objective(tmp_path: Path) -> None:
    data = write_latents(tmp_path / "data", size=(4, 8, 8))
    ddpm = {"diffusion__objective": "ddpm", "model__learned_variance": True, "model__attention": "factorized"}
    same = KEPT | CLIPS | ddpm | {"train__deterministic": True, "train__compile": True}
    configs = [run_config(tmp_path / str(on), data, **same, train__cuda_graphs=on) for on in (False, True)]
    run(1, configs)
    assert values(configs[0]) == values(configs[1])
