"""Measures of the model in training: what is refused before the run starts."""

from pathlib import Path

import numpy as np
import pytest

from rdm_scale.codecs.record import CodecRecord
from rdm_scale.config import ParallelConfig
from rdm_scale.data.compatibility import DataFacts
from rdm_scale.errors import ConfigError
from rdm_scale.evaluation.networks import load_network
from rdm_scale.evaluation.reference_file import write_reference
from rdm_scale.evaluation.sample_sets import ArraySamples
from rdm_scale.evaluation.set_statistics import Wanted, measure_set
from rdm_scale.storage.location import Location
from tests.support.rank_pool import RankPool
from tests.support.small_runs import run_config

FACTS = DataFacts({}, CodecRecord(name="identity", location="identity"), ())


def test_measures_need_a_reference_and_no_captions(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"measure_every needs monitor\.reference"):
        run_config(tmp_path, "data", monitor__measure_every=5)
    text = {"model__condition": "text"}
    with pytest.raises(ConfigError, match=r"measure_every needs class labels or no condition"):
        run_config(tmp_path, "data", monitor__measure_every=5, monitor__reference="r.npz", **text)


def refusal(tmp_path: Path, reference: str) -> str:
    """Run on a rank: the reason why a reference does not suit a model of 3 x 8 x 8 pixels."""
    from rdm_scale.evaluation.training_measure import TrainingMeasure
    from rdm_scale.parallel.mesh import build_mesh

    mesh = build_mesh(ParallelConfig())
    watched = {"monitor__measure_every": 5, "monitor__reference": reference, "model__input__channels": 3}
    try:
        TrainingMeasure(run_config(tmp_path, "data", **watched), mesh, FACTS)
    except ConfigError as error:
        return str(error)
    finally:
        mesh.shutdown()
    return ""


def test_a_reference_that_does_not_fit_stops_the_run_before_it_starts(ranks: RankPool, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 8, 3), dtype=np.uint8)
    statistics = measure_set(ArraySamples(pixels, "higher"), load_network("digits", 1), Wanted(), option="digits")
    write_reference(Location(tmp_path / "higher.npz"), statistics)
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    (found,) = ranks.run(1, refusal, tmp_path, str(tmp_path / "higher.npz"))
    assert "cannot be compared: height 9 against 8" in found
    (found,) = ranks.run(1, refusal, tmp_path, str(tmp_path / "adm.npz"))
    assert "does not say its network: write it with tools/measure.py reference" in found
