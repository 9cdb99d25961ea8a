"""tools/depth_report.py: one page that needs nothing else."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rdm_scale.errors import DataError
from rdm_scale.evaluation.plots import as_array, heat_map, is_logarithmic
from rdm_scale.tools import depth_report
from rdm_scale.training.depth_profiles import read_profiles


def write_run(run: Path, steps: int = 3) -> None:
    lines = [
        {"step": s, "stream": [1.0 + s, 2.0, 3.0], "attention.gain": [0.1, None, 0.1 * s]} for s in range(1, steps + 1)
    ]
    (run / "depth.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": 1 / s}) + "\n" for s in (1, 2, 3)))


def test_the_page_holds_its_pictures(tmp_path: Path) -> None:
    write_run(tmp_path)
    page = depth_report.report(tmp_path)
    assert re.findall("<h2>(.*?)</h2>", page) == ["loss", "stream", "attention.gain"]
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 3 and "http" not in page
    assert all(Image.open(io.BytesIO(base64.b64decode(picture))).width > 600 for picture in pictures)


def test_a_single_profile_is_shown(tmp_path: Path) -> None:
    write_run(tmp_path, steps=1)
    assert depth_report.report(tmp_path).count("<img") == 3


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no profiles"):
        depth_report.report(tmp_path)
    (tmp_path / "depth.jsonl").write_text('{"step": 1, "stream": [1.0]}\n{"stre\n')
    with pytest.raises(DataError, match=r"line 2 of .* is not a profile"):
        depth_report.report(tmp_path)


def test_heat_maps_show_depth_downwards_and_steps_to_the_right(tmp_path: Path) -> None:
    write_run(tmp_path)
    steps, profiles = read_profiles(tmp_path / "depth.jsonl")
    assert steps == [1, 2, 3]
    gains = as_array([profile["attention.gain"] for profile in profiles])
    assert gains.shape == (3, 3) and np.isnan(gains[1]).all() and gains[2].tolist() == pytest.approx([0.1, 0.2, 0.3])
    picture = heat_map([profile["attention.gain"] for profile in profiles])
    tall, wide = picture.shape[0] // 3, picture.shape[1] // 3
    assert not picture[tall : 2 * tall].any(), "nothing there is black"
    first, last = picture[-1, 0].astype(int), picture[-1, -1].astype(int)
    assert picture[0, 0].tolist() == picture[0, wide].tolist() == first.tolist()
    assert last.sum() > first.sum() + 100
    assert is_logarithmic(np.array([1.0, 20.0])) and not is_logarithmic(np.array([-1.0, 20.0]))
