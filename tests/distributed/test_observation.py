"""Validation, sampling and measures of samples do not change a run."""

import json
from pathlib import Path

import numpy as np
import pytest

from rdm_scale.evaluation.networks import load_network
from rdm_scale.evaluation.reference_file import write_reference
from rdm_scale.evaluation.sample_sets import ArraySamples
from rdm_scale.evaluation.set_statistics import Wanted, measure_set
from rdm_scale.storage.location import Location
from tests.support.rank_pool import RankPool
from tests.support.small_runs import metrics, run_config, train, write_latents


def write_digit_reference(path: Path) -> str:
    """Write the statistics of six random images of 8 x 8 pixels in the features of the packaged classifier."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    statistics = measure_set(ArraySamples(pixels, "random"), load_network("digits", 1), Wanted(6), option="digits")
    write_reference(Location(path), statistics)
    return str(path)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sampling_and_validation_do_not_change_training(ranks: RankPool, tmp_path: Path, precision: str) -> None:
    """EMA weights are swapped into the parameters of both ranks and out again, and some forwards have no backward."""
    data = write_latents(tmp_path / "train", channels=3)
    held_out = write_latents(tmp_path / "validation", samples=7, channels=3)
    reference = write_digit_reference(tmp_path / "reference.npz")
    same = {"model__input__channels": 3, "train__steps": 8, "train__precision": precision, "train__deterministic": True}
    ranks.run(2, train, run_config(tmp_path / "alone", data, **same))
    watched = {"data__validation": held_out, "monitor__validate_every": 3, "monitor__sample_every": 2}
    watched |= {"monitor__measure_every": 4, "monitor__measure_samples": 11, "monitor__reference": reference}
    sampling = {"sampling__steps": 3, "sampling__guidance": 2.0, "monitor__sample_columns": 3}
    ranks.run(2, train, run_config(tmp_path / "watched", data, **same, **watched, **sampling))
    records = metrics(tmp_path / "watched" / "run")
    measured = {r["step"]: (r.pop("FD(digits)"), r.pop("KD(digits)")) for r in records if "FD(digits)" in r}
    lines = [json.loads(line) for line in (tmp_path / "watched" / "run" / "measures.jsonl").read_text().splitlines()]
    assert {line["step"]: (line["FD(digits)"]["value"], line["KD(digits)"]["value"]) for line in lines} == measured
    assert list(measured) == [4, 8] and measured[4] != measured[8]
    fields = {name: lines[0]["FD(digits)"][name] for name in ("generated", "real", "weights", "steps", "guidance")}
    assert fields == {"generated": 11, "real": 6, "weights": "ema", "steps": 3, "guidance": 2.0}
    assert [r["step"] for r in records if r.pop("validation_loss", None)] == [3, 6]
    assert records == metrics(tmp_path / "alone" / "run")
    assert len(list((tmp_path / "watched" / "run" / "samples").glob("*.png"))) == 4


def test_samples_that_cannot_be_drawn_do_not_end_a_run(ranks: RankPool, tmp_path: Path) -> None:
    data = write_latents(tmp_path / "train", channels=3)
    ddpm = {"diffusion__objective": "ddpm", "diffusion__num_timesteps": 100, "sampling__steps": 101}
    watched = {"train__steps": 2, "monitor__sample_every": 1}
    ranks.run(2, train, run_config(tmp_path, data, model__input__channels=3, **ddpm, **watched))
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2]
    assert not (tmp_path / "run" / "samples").exists()
