"""Validation and sampling do not change a run."""

from pathlib import Path

import pytest

from tests.support.rank_pool import RankPool
from tests.support.small_runs import metrics, run_config, train, write_latents


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sampling_and_validation_do_not_change_training(ranks: RankPool, tmp_path: Path, precision: str) -> None:
    """EMA weights are swapped into the parameters of both ranks and out again, and some forwards have no backward."""
    data = write_latents(tmp_path / "train", channels=3)
    held_out = write_latents(tmp_path / "validation", samples=7, channels=3)
    same = {"model__input__channels": 3, "train__steps": 8, "train__precision": precision, "train__deterministic": True}
    ranks.run(2, train, run_config(tmp_path / "alone", data, **same))
    watched = {"data__validation": held_out, "monitor__validate_every": 3, "monitor__sample_every": 2}
    sampling = {"sampling__steps": 3, "sampling__guidance": 2.0, "monitor__sample_columns": 3}
    ranks.run(2, train, run_config(tmp_path / "watched", data, **same, **watched, **sampling))
    records = metrics(tmp_path / "watched" / "run")
    assert [r["step"] for r in records if r.pop("validation_loss", None)] == [3, 6]
    assert records == metrics(tmp_path / "alone" / "run")
    assert len(list((tmp_path / "watched" / "run" / "samples").glob("*.png"))) == 4
