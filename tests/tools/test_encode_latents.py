"""The command as a user calls it."""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from rdm_scale.data.manifest import read_manifest

TOOL = Path(__file__).parents[2] / "tools/encode_latents.py"
COUNT = 60


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("input") / "digits.tar"
    with tarfile.open(path, "w") as tar:
        for index, (scan, label) in enumerate(list(zip(*load_digits(return_X_y=True), strict=True))[:COUNT]):
            buffer = io.BytesIO()
            Image.fromarray((scan.reshape(8, 8) * 15).astype(np.uint8)).resize((32, 32)).save(buffer, "PNG")
            for suffix, content in (("png", buffer.getvalue()), ("cls", str(label).encode())):
                info = tarfile.TarInfo(f"{index}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def test_the_whole_command(digits, tmp_path):
    out, held, preview = tmp_path / "latents", tmp_path / "validation", tmp_path / "preview.png"
    result = call(
        *(digits, out, "--codec", "digits", "--size", 32, "--latents", "moments", "--dtype", "bfloat16"),
        *("--holdout", held, "--holdout-share", 0.2, "--seed", 3, "--batch-size", 8, "--preview", preview),
    )
    assert result.returncode == 0, result.stderr
    (train, _), (validation, _) = read_manifest(str(out)), read_manifest(str(held))
    assert train.samples + validation.samples == COUNT and validation.samples > 0
    assert (train.kind, train.dtype, train.shape) == ("moments", "bfloat16", (4, 1, 8, 8))
    assert f"{out}/manifest.json: {train.samples} samples" in result.stdout
    assert f"{held}/manifest.json: {validation.samples} samples" in result.stdout
    assert "standard deviation 1." in result.stdout or "standard deviation 0.9" in result.stdout
    assert f"{COUNT}/{COUNT}" in result.stderr and "sample/s" in result.stderr  # progress
    assert "warning" not in result.stderr

    # Originals above reconstructions: the halves of the picture are nearly the same.
    picture = np.asarray(Image.open(preview).convert("L")).astype(float)
    cells = picture[-2 * (64 + 8) - 8 :]
    above, below = cells[8 : 8 + 64], cells[8 + 64 + 8 : 8 + 64 + 8 + 64]
    assert np.abs(above - below).mean() < 6 and not np.array_equal(above, below)
    assert above[:, 8:72].min() < 60  # there is a digit


def test_an_error_is_one_line_and_leaves_nothing(digits, tmp_path):
    bad = bytearray(digits.read_bytes())
    with tarfile.open(digits) as tar:
        offset = tar.getmember("7.png").offset_data
    bad[offset : offset + 8] = b"\0" * 8
    (tmp_path / "bad.tar").write_bytes(bad)
    result = call(tmp_path / "bad.tar", tmp_path / "out", "--codec", "identity", "--size", 32)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if "error" in line]
    assert line.startswith("encode_latents: error: cannot decode the image") and "bad.tar:7.png" in line
    assert "Traceback" not in result.stderr and not (tmp_path / "out").exists()


def test_wrong_usage_is_told_before_anything_is_read(tmp_path):
    for wrong, message in (
        (("--size", 0), "less than 1"),
        (("--size", 32, "--holdout-share", 0.2), "needs --holdout"),
        (("--size", 32, "--holdout", "x", "--holdout-share", 1.5), "between 0 and 1"),
        (("--size", 32, "--preview", "x.gif"), "must end with .png"),
        ((), "required: --size"),
    ):
        result = call(tmp_path / "nothing", tmp_path / "out", "--codec", "identity", *wrong)
        assert result.returncode == 2 and message in result.stderr


def test_a_warning_when_latents_are_far_from_unit_scale(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (120 + i, 120, 120)).save(tmp_path / f"in/{i}.png")
    result = call(tmp_path / "in", tmp_path / "out", "--codec", "identity", "--size", 8)
    assert result.returncode == 0 and "warning: diffusion expects a standard deviation near 1" in result.stderr
