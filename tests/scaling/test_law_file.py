"""Law files, tables of runs, and the command that fits them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rdm_scale.errors import DataError
from rdm_scale.scaling.allocation import TrainingFlops
from rdm_scale.scaling.guards import prediction_warnings
from rdm_scale.scaling.law_file import fit_with_intervals, read_law, run_flops, write_law
from rdm_scale.scaling.law_plots import law_page
from rdm_scale.scaling.observations import read_observations
from rdm_scale.storage.location import Location
from tests.scaling.test_law import CHINCHILLA, isoflop_runs
from tests.support.limits import HANG_S


def write_table(file: Path, noise: float = 0.0) -> None:
    runs = isoflop_runs(CHINCHILLA, noise)
    rows = zip(runs.parameters.tolist(), runs.samples.tolist(), runs.loss.tolist(), strict=True)
    file.write_text("name, parameters,samples,loss\n" + "".join(f"x,{n!r},{d!r},{loss!r}\n" for n, d, loss in rows))


def test_tables_as_people_write_them(tmp_path: Path) -> None:
    table = tmp_path / "runs.csv"
    table.write_bytes(b"\xef\xbb\xbfparameters,samples,loss,depth,note\r\n1e6,2e9,3.5,4,a\r\n2000000,1,2.25,8,\r\n")
    runs = read_observations(Location(table))
    assert runs.parameters.tolist() == [1e6, 2e6] and runs.loss.tolist() == [3.5, 2.25]
    assert runs.flops is None and runs.by_depth().parameters.tolist() == [4, 8]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "has no column parameters, samples, loss"),
        ("parameters,loss\n1,2\n", "has no column samples"),
        ("parameters,samples,loss\n1,2,3\n1,2,\n", "line 3: loss is ''"),
        ("parameters,samples,loss\n1,-2,3\n", "line 2: samples is '-2'"),
        ("parameters,samples,loss\n1,2,nan\n", "line 2: loss is 'nan'"),
    ],
)
def test_bad_tables_are_refused(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text(text)
    with pytest.raises(DataError, match=re.escape(reason)):
        read_observations(Location(tmp_path / "runs.csv"))


def test_a_law_survives_its_file(tmp_path: Path) -> None:
    law = fit_with_intervals(isoflop_runs(CHINCHILLA, noise=0.01), replicates=4)
    write_law(Location(tmp_path / "law.json"), law)
    found, digest = read_law(Location(tmp_path / "law.json"))
    assert found.law == law.law and found.replicates == law.replicates and len(digest) == 64
    assert found.observations.loss.tolist() == law.observations.loss.tolist()
    tree = json.loads((tmp_path / "law.json").read_text())
    assert set(tree) >= {"E", "A", "B", "alpha", "beta", "intervals", "objective", "left_out", "optimal"}
    assert tree["intervals"]["alpha"][0] <= tree["alpha"] <= tree["intervals"]["alpha"][1]
    (tmp_path / "law.json").write_text("{}")
    with pytest.raises(DataError, match="is no law"):
        read_law(Location(tmp_path / "law.json"))


def test_far_extrapolations_are_said() -> None:
    law = fit_with_intervals(isoflop_runs(CHINCHILLA), replicates=2)
    largest = float(run_flops(law.observations, TrainingFlops()).max())
    size, samples = law.observations.parameters.max(), law.observations.samples.max()
    assert prediction_warnings(law, size, samples, 9 * largest) == []
    assert "11.0 times" in prediction_warnings(law, size, samples, 11 * largest)[0]


def test_the_page_holds_the_runs_and_asks_nobody() -> None:
    law = fit_with_intervals(isoflop_runs(CHINCHILLA), replicates=2, left_out=["</script><b>"])
    page = law_page(law, b"picture")
    assert page.count("</script>") == 1 and "&lt;/script&gt;" in page
    assert not re.search(r"(src|href)=.http", page) and "__" not in re.sub(r"__\w*__\b", "", page)
    data = json.loads(re.search(r"const data = (.*);", page)[1])  # type: ignore[index]
    assert len(data["runs"]) == 36 and data["law"]["E"] == pytest.approx(1.69, rel=1e-6)


@pytest.mark.processes
def test_fit_and_predict_as_commands(tmp_path: Path) -> None:
    write_table(tmp_path / "runs.csv", noise=0.003)
    tool = [sys.executable, "tools/scaling.py"]
    fit = [*tool, "fit", str(tmp_path / "runs.csv"), "--hold-out", "largest", "--leave-out-highest", "1"]
    fit += ["--replicates", "10", "--workers", "1", "-o", str(tmp_path / "law.json")]
    done = subprocess.run(fit, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 0, done.stderr
    assert "left out: the 1 highest losses" in done.stdout and "runs of most FLOPs, held out" in done.stdout
    assert re.search(r"held out: [\d.]+ measured, [\d.]+ predicted \([+-]\d\.\d%\)", done.stdout)
    assert (tmp_path / "law.png").stat().st_size > 10_000 and (tmp_path / "law.html").exists()
    tree = json.loads((tmp_path / "law.json").read_text())
    assert np.isclose(tree["alpha"], 0.34, rtol=0.2)

    predict = [*tool, "predict", str(tmp_path / "law.json"), "configs/quickstart.yaml", "train.steps=400000"]
    done = subprocess.run(predict, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "law.predictions.jsonl").read_text())
    assert record["samples"] == 400_000 * 64 and record["low"] <= record["loss"] <= record["high"]
    by_hand = tree["E"] + tree["A"] / record["parameters"] ** tree["alpha"] + tree["B"] / 2.56e7 ** tree["beta"]
    assert record["loss"] == pytest.approx(by_hand)
