"""An interrupted run resumes as if it had not been interrupted, on the same ranks or on others."""

import shutil
from pathlib import Path

import pytest
import torch

from rdm_scale.checkpoint import load_model
from rdm_scale.errors import ConfigError
from tests.support.rank_pool import RankPool
from tests.support.small_runs import metrics, run_config, train, write_latents

STEPS = 12
VALIDATED = {"monitor__validate_every": 4, "train__steps": STEPS}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    # 20 samples with batches of 8: epochs end inside a step, and the run crosses several.
    held_out = write_latents(folder / "validation", samples=11, seed=1)
    return {"data__train": write_latents(folder / "train", samples=20), "data__validation": held_out}


@pytest.fixture(scope="module")
def whole(ranks: RankPool, data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the run that was never interrupted."""
    config = run_config(tmp_path_factory.mktemp("whole"), data["data__train"], **VALIDATED, **data)
    ranks.run(2, train, config)
    return Path(config.run.dir)


@pytest.fixture(scope="module")
def uninterrupted(whole: Path) -> list[dict]:
    records = metrics(whole)
    assert [r["step"] for r in records if "validation_loss" in r] == [4, 8, 12]
    return records


def train_in_parts(ranks: RankPool, tmp_path: Path, data: dict[str, str], parts: list[tuple[int, int]]) -> list[dict]:
    """Train in parts, each (last step, number of ranks), and return the metrics of all steps."""
    for steps, world in parts:
        config = run_config(tmp_path, data["data__train"], **(VALIDATED | data | {"train__steps": steps}))
        ranks.run(world, train, config)
    return metrics(config.run.dir)


@pytest.mark.parametrize("stops", [[1], [5], [11], [2, 3, 8]], ids=str)
def test_resume_on_the_same_ranks_is_bit_identical(
    ranks: RankPool, uninterrupted: list[dict], data: dict[str, str], tmp_path: Path, stops: list[int]
) -> None:
    assert train_in_parts(ranks, tmp_path, data, [(s, 2) for s in [*stops, STEPS]]) == uninterrupted


def test_weights_and_ema_equal_those_of_the_uninterrupted_run(
    ranks: RankPool, whole: Path, data: dict[str, str], tmp_path: Path
) -> None:
    train_in_parts(ranks, tmp_path, data, [(7, 2), (STEPS, 2)])
    for kind in ("weights", "ema"):
        expected = dict(load_model(str(whole), kind).named_parameters())
        for name, parameter in load_model(str(tmp_path / "run"), kind).named_parameters():
            assert torch.equal(parameter, expected[name]), (kind, name)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_in_bf16_is_bit_identical(ranks: RankPool, data: dict[str, str], tmp_path: Path, stage: int) -> None:
    """After a resume the bf16 weights are recomputed from the fp32 master weights."""
    same = {"train__precision": "bf16", "parallel__zero_stage": stage, "train__micro_batch_size": 2}
    for name, stops in (("whole", [6]), ("parts", [3, 6])):
        for steps in stops:
            config = run_config(tmp_path / name, data["data__train"], **same, train__steps=steps)
            ranks.run(2, train, config)
    assert metrics(tmp_path / "parts" / "run") == metrics(tmp_path / "whole" / "run")


@pytest.mark.full
def test_resume_after_any_step_is_bit_identical(
    ranks: RankPool, uninterrupted: list[dict], data: dict[str, str], tmp_path: Path
) -> None:
    for stop in range(1, STEPS):
        assert train_in_parts(ranks, tmp_path / str(stop), data, [(stop, 2), (STEPS, 2)]) == uninterrupted, stop


@pytest.mark.parametrize("parts", [[(6, 2), (12, 4)], [(6, 4), (12, 1)], [(3, 1), (7, 4), (12, 2)]], ids=str)
def test_resume_on_other_ranks_agrees_within_rounding(
    ranks: RankPool, uninterrupted: list[dict], data: dict[str, str], tmp_path: Path, parts: list[tuple[int, int]]
) -> None:
    records = train_in_parts(ranks, tmp_path, data, parts)
    for record, expected in zip(records, uninterrupted, strict=True):
        assert record == pytest.approx(expected, rel=1e-5)


def test_steps_after_the_newest_checkpoint_are_trained_again(
    ranks: RankPool, uninterrupted: list[dict], data: dict[str, str], tmp_path: Path
) -> None:
    changes = VALIDATED | data | {"checkpoint__every": 5, "train__steps": 11}
    config = run_config(tmp_path, data["data__train"], **changes)
    ranks.run(2, train, config)
    # State after a kill: the newest checkpoint is of step 10, and the last line of the metrics is incomplete.
    shutil.rmtree(Path(config.run.dir) / "checkpoints" / "step_00000011")
    with (Path(config.run.dir) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')
    ranks.run(2, train, run_config(tmp_path, data["data__train"], **(changes | {"train__steps": STEPS})))
    assert metrics(config.run.dir) == uninterrupted


def test_resume_takes_a_named_checkpoint_into_a_new_run(
    ranks: RankPool, uninterrupted: list[dict], data: dict[str, str], tmp_path: Path
) -> None:
    train_in_parts(ranks, tmp_path, data, [(5, 2)])
    source = str(tmp_path / "run" / "checkpoints" / "step_00000005")
    changes = VALIDATED | data | {"checkpoint__resume": source, "run__dir": str(tmp_path / "second")}
    ranks.run(2, train, run_config(tmp_path, data["data__train"], **(changes | {"train__steps": 9})))
    ranks.run(2, train, run_config(tmp_path, data["data__train"], **changes))  # the same command again goes on
    assert metrics(tmp_path / "second") == uninterrupted[5:]
    elsewhere = changes | {"checkpoint__resume": shutil.copytree(source, tmp_path / "copy" / "step_00000005")}
    with pytest.raises(
        ConfigError, match=r"holds a later checkpoint \(step 12\) than the one to resume from \(step 5\)"
    ):
        ranks.run(1, train, run_config(tmp_path, data["data__train"], **elsewhere))


def test_another_run_is_refused_with_the_differing_keys(ranks: RankPool, data: dict[str, str], tmp_path: Path) -> None:
    train_in_parts(ranks, tmp_path, data, [(2, 1)])
    before = metrics(tmp_path / "run")
    other = VALIDATED | data | {"model__depth": 4, "train__seed": 9}
    with pytest.raises(
        ConfigError, match=r"(?s)belongs to another run.*model.depth: 3 there, 4 here.*train.seed: 3 there"
    ):
        ranks.run(1, train, run_config(tmp_path, data["data__train"], **other))
    other_data = data | {"data__train": write_latents(tmp_path / "other", samples=20, seed=5)}
    with pytest.raises(
        ConfigError,
        match=r"(?s)belongs to another run.*data.train: \w+ there, \w+ here.*checkpoint.start_from=\S+step_",
    ):
        ranks.run(1, train, run_config(tmp_path, data["data__train"], **(VALIDATED | other_data)))
    with pytest.raises(ConfigError, match="holds a run already and checkpoint"):
        ranks.run(1, train, run_config(tmp_path, data["data__train"], **VALIDATED, **data, checkpoint__resume="never"))
    assert metrics(tmp_path / "run") == before
