"""The tar of digit clips is what a user's own webdataset tar of videos would be."""

import io
import subprocess
import sys
from pathlib import Path

import webdataset
from sklearn.datasets import load_digits

from rdm_scale.encoding.videos import decode_clip

TOOL = Path(__file__).parents[2] / "tools/make_digit_clips.py"


def make(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_the_tar(tmp_path: Path) -> None:
    for name, clips in (("new/a.tar", 12), ("b.tar", 12), ("c.tar", 3)):
        result = make(tmp_path / name, "--clips", clips)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "new/a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    more, fewer = (list(webdataset.WebDataset(str(tmp_path / f"{n}.tar"), shardshuffle=False)) for n in ("b", "c"))
    assert [int(sample["cls"]) for sample in more] == load_digits().target[:12].tolist()
    assert [sample["mp4"] for sample in fewer] == [sample["mp4"] for sample in more[:3]]
    clip = decode_clip(io.BytesIO(more[0]["mp4"]), "0", fps=24.0, start=0, frames=24, height=32, width=32)
    assert clip.amax() > 0.7 and (clip[:, 0] - clip[:, -1]).abs().max() > 1


def test_wrong_usage(tmp_path: Path) -> None:
    assert "even number" in make(tmp_path / "x.tar", "--size", 33).stderr
    (tmp_path / "file").write_text("")
    result = make(tmp_path / "file/x.tar", "--clips", 1)
    assert result.returncode == 1 and result.stderr.startswith("make_digit_clips: error: cannot write")
