"""The tar of digits is what a user's own webdataset tar would be."""

import io
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image
from sklearn.datasets import load_digits

TOOL = Path(__file__).parents[2] / "tools/make_digits.py"


def make(output, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, output, *options], capture_output=True, text=True, check=False)


def test_the_tar(tmp_path):
    for name in ("new/a.tar", "b.tar"):
        result = make(tmp_path / name)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "new/a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.tar", "new"]  # no temporary file stays

    with tarfile.open(tmp_path / "b.tar") as tar:
        assert tar.getnames()[:3] == ["00000.png", "00000.cls", "00001.png"]
        assert len(tar.getnames()) == 2 * 1797

    scans, labels = load_digits(return_X_y=True)
    samples = list(webdataset.WebDataset(str(tmp_path / "b.tar"), shardshuffle=False))  # as any other reader
    assert [int(sample["cls"]) for sample in samples] == labels.tolist()
    images = np.stack([np.asarray(Image.open(io.BytesIO(sample["png"]))) for sample in samples])
    assert images.shape == (1797, 32, 32, 3) and images.dtype == np.uint8
    assert (images[..., :1] == images).all()
    # Averaged over its 4 x 4 pixels, an enlarged scan is nearly the scan.
    averages = images[..., 0].reshape(1797, 8, 4, 8, 4).mean(axis=(2, 4)).reshape(1797, 64)
    assert np.abs(averages - scans * 255 / 16).mean() < 16
    assert min(np.corrcoef(a, b)[0, 1] for a, b in zip(averages, scans, strict=True)) > 0.97


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    result = make(tmp_path / "file/digits.tar")
    assert result.returncode == 1
    assert result.stderr.startswith("make_digits: error: cannot write") and result.stderr.count("\n") == 1


def test_captions_name_the_digit(tmp_path):
    assert make(tmp_path / "a.tar", "--captions").returncode == 0
    samples = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    forms = set()
    for sample in samples:
        text, label = sample["txt"].decode(), int(sample["cls"])
        said = [name for name in (words[label], str(label)) if name in text.replace(",", "").split()]
        assert len(said) == 1, text
        forms.add(re.sub(rf"\b{said[0]}\b", "#", text))
    assert len(samples) == 1797 and len(forms) == 8
