"""A run made deeper by the tool: the same function, the same place in the data, and training that goes on."""

from pathlib import Path

import pytest
import torch

from rdm_scale.checkpoint import CheckpointDirectory, load_trained
from rdm_scale.checkpoint.convert.checkpoint_writer import STATE_ENTRIES, write_checkpoint
from rdm_scale.checkpoint.convert.grow import grow_checkpoint
from rdm_scale.checkpoint.directory import open_checkpoint
from rdm_scale.errors import CheckpointError, ConfigError
from rdm_scale.models import build_model
from rdm_scale.models.gates import ResidualGate
from rdm_scale.storage.location import Location
from tests.support.forked import Result, Running
from tests.support.rank_pool import RankPool
from tests.support.small_runs import metrics, run_config, train, write_latents

TOOL = Path("tools/grow_depth.py").resolve()
ALONE = {"tensor": 1, "pipeline": 1, "data": 1}


def tool(tmp_path: Path, *arguments: object) -> Result:
    return Running(tmp_path, TOOL, arguments).result()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_latents(tmp_path_factory.mktemp("data"), samples=40)


@pytest.fixture(scope="module")
def run(ranks: RankPool, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run of 3 blocks that was trained for 6 steps on two ranks, with a step saved before."""
    config = run_config(tmp_path_factory.mktemp("shallow"), data, train__steps=6, checkpoint__every=5)
    ranks.run(2, train, config)
    return Path(config.run.dir)


def outputs(path: Path, weights: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(4, 4, 1, 8, 8, generator=generator)
    return load_trained(str(path), weights).model(latents, torch.tensor([1.0, 200, 700, 990]), torch.arange(4))


def test_a_grown_run_goes_on_where_the_shallow_one_was(ranks: RankPool, run: Path, data: str, tmp_path: Path) -> None:
    done = tool(tmp_path, run / "checkpoints" / "step_00000005", tmp_path / "grown", "--depth", 6)
    grown = tmp_path / "grown" / "step_00000005"
    assert done.returncode == 0, done.stderr
    assert "step 5, 3 blocks grown to 6 (interleaved)" in done.stdout
    assert f"model.depth=6 checkpoint.resume={grown} run.dir=" in done.stdout
    for weights in ("weights", "ema"):
        expected = outputs(run / "checkpoints" / "step_00000005", weights)
        assert ((outputs(grown, weights) - expected).norm() / expected.norm()).item() < 1e-6

    changes = {"model__depth": 6, "train__steps": 8, "checkpoint__resume": str(grown)}
    ranks.run(2, train, run_config(tmp_path, data, parallel__pipeline=2, **changes))
    records, shallow = metrics(tmp_path / "run"), metrics(run)
    assert [record["step"] for record in records] == [6, 7, 8]
    # Step 6 takes the samples that the shallow run took, of which the grown network makes the same loss.
    assert records[0]["loss"] == pytest.approx(shallow[5]["loss"], rel=1e-6)
    gates = [m.a for m in load_trained(str(tmp_path / "run"), "weights").model.modules() if isinstance(m, ResidualGate)]
    assert len(gates) == 12
    assert all(gate.any() for gate in gates)


def test_a_restart_begins_at_step_0_without_moments(ranks: RankPool, run: Path, data: str, tmp_path: Path) -> None:
    done = tool(tmp_path, run, tmp_path / "grown", "--depth", 9, "--placement", "stacked", "--restart")
    assert done.returncode == 0, done.stderr
    state, reader = open_checkpoint(Location(tmp_path / "grown" / "step_00000000"))
    assert (state["step"], state["samples"], state["identity"]["model.depth"]) == (0, 0, 9)
    for entry in ("exp_avg", "exp_avg_sq"):
        assert not any(value.any() for value in reader.read_many(entry, reader.names()).values())
    expected = outputs(run, "weights")
    assert ((outputs(tmp_path / "grown", "weights") - expected).norm() / expected.norm()).item() < 1e-6
    # Found by itself where a run's checkpoints are.
    changes = {"model__depth": 9, "train__steps": 1, "checkpoint__dir": str(tmp_path / "grown")}
    ranks.run(1, train, run_config(tmp_path, data, **changes))
    assert [(record["step"], record["lr"]) for record in metrics(tmp_path / "run")] == [(1, 5e-4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depth", 3], "3 blocks grows to more of them, not to 3"),
        (["--depth", 7, "--placement", "stacked"], "must be a multiple of the old, and 7 blocks are not one of 3"),
        (["--depth", "many"], "invalid int value: 'many'"),
        (["--depth", 6, "--placement", "sideways"], "invalid choice: 'sideways'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_message(
    run: Path, tmp_path: Path, arguments: list[object], message: str
) -> None:
    done = tool(tmp_path, run, tmp_path / "grown", *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "grown").exists()


def test_nothing_is_replaced(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="step_00000006 exists already: name another folder"):
        grow_checkpoint(str(run), 6, str(run / "checkpoints"))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def handmade(tmp_path: Path, residual: str = "neural_rdm", **changes: object) -> Path:
    """A checkpoint of 2 blocks in which every tensor is one number; `changes` are to its state or, by name, tensors."""
    config = run_config(tmp_path, "none", model__depth=2, model__residual=residual)
    state = {"step": 4, "config": config.model_dump(mode="json"), "identity": config.identity(), "layout": ALONE}
    numbers = dict(zip(STATE_ENTRIES, (1.0, 2.0, 4.0, 8.0), strict=True))
    tensors = {
        name: {entry: torch.full(parameter.shape, number) for entry, number in numbers.items()}
        for name, parameter in build_model(config.model).named_parameters()
    }
    for key, value in changes.items():
        target = state if key in state else tensors
        if value is None:
            del target[key]
        else:
            target[key] = value
    write_checkpoint(CheckpointDirectory(Location(tmp_path / "hand")), state, tensors.items())
    return tmp_path / "hand"


def test_every_state_entry_of_a_checkpoint_is_grown(tmp_path: Path) -> None:
    """From 2 to 8 blocks gates are multiplied by 2, gradients halved; block 4 is the old block 1, block 5 is new."""
    grown = grow_checkpoint(str(handmade(tmp_path)), 8, str(tmp_path / "grown"))
    state, reader = open_checkpoint(grown.folder)
    assert (state["config"]["model"]["depth"], state["grown_from"]["depth"]) == (8, 2)
    values = [
        {name: sorted(set(reader.read(entry, name).flatten().tolist())) for name in reader.names()}
        for entry in STATE_ENTRIES
    ]
    for name, expected in {
        "blocks.4.mlp.gate.a": [2.0, 1.0, 1.0, 16.0],
        "blocks.4.mlp.branch.up.weight": [1.0, 2.0, 4.0, 8.0],
        "blocks.5.mlp.gate.a": [0.0, 0.0, 0.0, 0.0],
        "class_embed.weight": [1.0, 2.0, 4.0, 8.0],
    }.items():
        assert [value[name] for value in values] == [[number] for number in expected]
    weights, first, second, ema = (value["blocks.5.mlp.branch.up.weight"] for value in values)
    assert weights == ema
    assert len(weights) > 1000
    assert first == second == [0.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"residual": "plain"}, "model.residual=plain cannot grow"),
        ({"config": None}, "is not valid"),
        ({"config": {"model": {"depth": 1}}}, "run is missing"),
        ({"identity": [1]}, "does not say what run it belongs to"),
        ({"head.out.bias": None}, "lacks the tensor head.out.bias"),
        ({"blocks.2.mlp.gate.a": dict.fromkeys(STATE_ENTRIES, torch.ones(32))}, "has the tensor blocks.2.mlp.gate.a"),
        (
            {"head.out.bias": dict.fromkeys(STATE_ENTRIES, torch.ones(3))},
            r"head.out.bias has shape \[3\], not as configured",
        ),
    ],
)
def test_a_checkpoint_that_is_not_what_it_says_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises((CheckpointError, ConfigError), match=message):
        grow_checkpoint(str(handmade(tmp_path, **changes)), 4, str(tmp_path / "grown"))
    assert not (tmp_path / "grown").exists()


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a complete checkpoint nor a run"):
        grow_checkpoint(str(tmp_path), 4, str(tmp_path / "grown"))
