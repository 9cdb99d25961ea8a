"""tools/depth_report.py: one self-contained page."""

import base64
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from rdm_scale.errors import DataError
from rdm_scale.tools import depth_report


def write_run(run: Path, steps: int = 3) -> None:
    lines = [
        {"step": s, "stream": [1.0 + s, 2.0, 3.0], "attention.gain": [0.1, None, 0.1 * s]} for s in range(1, steps + 1)
    ]
    (run / "depth.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": 1 / s}) + "\n" for s in (1, 2, 3)))


def test_the_page_embeds_its_images(tmp_path: Path) -> None:
    write_run(tmp_path)
    page = depth_report.report(tmp_path)
    assert "steps 1 to 3" in page
    assert re.findall("<h2>(.*?)</h2>", page) == ["loss", "stream", "attention.gain"]
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 3 and "http" not in page
    assert all(Image.open(io.BytesIO(base64.b64decode(picture))).width > 600 for picture in pictures)


def test_a_single_profile_is_shown(tmp_path: Path) -> None:
    write_run(tmp_path, steps=1)
    assert depth_report.report(tmp_path).count("<img") == 3


def test_runs_without_profiles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no profiles"):
        depth_report.report(tmp_path)


def test_odd_lines_cost_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    odd = ['{"stre', "[]", '{"step": 2, "stream": [1.0, 2.0]}', '{"step": 2, "stream": "x"}', '{"stream": [1, 2, 3]}']
    path = tmp_path / "depth.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *odd, *lines[1:]]) + "\n")
    assert depth_report.report(tmp_path).count("<img") == 3
    printed = capsys.readouterr().err
    assert "4 of 8 lines are left out, each is not a profile along depth: lines 2, 3, 5, 6" in printed
    assert "1 profiles of another depth than the last one are left out" in printed
