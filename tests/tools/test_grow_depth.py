"""A run grown by the tool: the same function, the same position in the data, and training that continues."""

import re
from pathlib import Path
from typing import get_args

import pytest
import torch

from rdm_scale.checkpoint import load_trained
from rdm_scale.checkpoint.convert.grow import grow_checkpoint
from rdm_scale.checkpoint.directory import open_checkpoint
from rdm_scale.errors import CheckpointError
from rdm_scale.models.depth_growth import BlockPlacement
from rdm_scale.models.gates import ResidualGate
from rdm_scale.storage.location import Location
from rdm_scale.tools.grow_depth import PLACEMENTS
from tests.support.forked import Result, Running
from tests.support.rank_pool import RankPool
from tests.support.small_runs import metrics, run_config, train, write_latents

TOOL = Path("tools/grow_depth.py").resolve()


def tool(tmp_path: Path, *arguments: object) -> Result:
    return Running(tmp_path, TOOL, arguments).result()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_latents(tmp_path_factory.mktemp("data"), samples=40)


@pytest.fixture(scope="module")
def run(ranks: RankPool, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run of 3 blocks, trained for 6 steps on two ranks and saved at steps 5 and 6."""
    config = run_config(tmp_path_factory.mktemp("shallow"), data, train__steps=6, checkpoint__every=5)
    ranks.run(2, train, config)
    return Path(config.run.dir)


def outputs(path: Path, weights: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(4, 4, 1, 8, 8, generator=generator)
    return load_trained(str(path), weights).model(latents, torch.tensor([1.0, 200, 700, 990]), torch.arange(4))


def test_a_grown_run_continues_from_the_shallow_one(ranks: RankPool, run: Path, data: str, tmp_path: Path) -> None:
    done = tool(tmp_path, run / "checkpoints" / "step_00000005", tmp_path / "grown", "--depth", 6)
    grown = tmp_path / "grown" / "step_00000005"
    assert done.returncode == 0, done.stderr
    assert "step 5, 3 blocks grown to 6 (interleaved)" in done.stdout
    written, total = re.findall(r"^writing: (\S+)/(\S+) parameters", done.stderr, re.MULTILINE)[-1]
    assert written == total
    assert f"model.depth=6 checkpoint.resume={grown} run.dir=" in done.stdout
    for weights in ("weights", "ema"):
        expected = outputs(run / "checkpoints" / "step_00000005", weights)
        assert ((outputs(grown, weights) - expected).norm() / expected.norm()).item() < 1e-6

    changes = {"model__depth": 6, "train__steps": 8, "checkpoint__resume": str(grown)}
    ranks.run(2, train, run_config(tmp_path, data, parallel__pipeline=2, **changes))
    records, shallow = metrics(tmp_path / "run"), metrics(run)
    assert [record["step"] for record in records] == [6, 7, 8]
    # Step 6 uses the samples of the shallow run's step 6, for which the grown network has the same loss.
    assert records[0]["loss"] == pytest.approx(shallow[5]["loss"], rel=1e-6)
    gates = [m.a for m in load_trained(str(tmp_path / "run"), "weights").model.modules() if isinstance(m, ResidualGate)]
    assert len(gates) == 12
    assert all(gate.any() for gate in gates)


def test_a_restart_begins_at_step_0_without_optimizer_state(
    ranks: RankPool, run: Path, data: str, tmp_path: Path
) -> None:
    done = tool(tmp_path, run, tmp_path / "grown", "--depth", 9, "--placement", "stacked", "--restart")
    assert done.returncode == 0, done.stderr
    state, reader = open_checkpoint(Location(tmp_path / "grown" / "step_00000000"))
    assert (state["step"], state["samples"], state["identity"]["model.depth"]) == (0, 0, 9)
    for entry in ("exp_avg", "exp_avg_sq"):
        assert not any(value.any() for value in reader.read_many(entry, reader.names()).values())
    expected = outputs(run, "weights")
    assert ((outputs(tmp_path / "grown", "weights") - expected).norm() / expected.norm()).item() < 1e-6
    # With checkpoint.resume=auto, a run finds the checkpoint in its directory of checkpoints.
    changes = {"model__depth": 9, "train__steps": 1, "checkpoint__dir": str(tmp_path / "grown")}
    ranks.run(1, train, run_config(tmp_path, data, **changes))
    assert [(record["step"], record["lr"]) for record in metrics(tmp_path / "run")] == [(1, 5e-4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depth", 3], "3 blocks can only grow to more blocks, not to 3"),
        (["--depth", 7, "--placement", "stacked"], "must be a multiple of the old, and 7 blocks are not one of 3"),
        (["--depth", "many"], "invalid int value: 'many'"),
        (["--depth", 6, "--placement", "sideways"], "invalid choice: 'sideways'"),
    ],
)
def test_impossible_arguments_are_refused_in_one_message(
    run: Path, tmp_path: Path, arguments: list[object], message: str
) -> None:
    done = tool(tmp_path, run, tmp_path / "grown", *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "grown").exists()


def test_nothing_is_replaced(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="step_00000006 exists already: choose another folder"):
        grow_checkpoint(str(run), 6, str(run / "checkpoints"))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_all_placements_are_offered() -> None:
    assert get_args(BlockPlacement) == PLACEMENTS
