"""The command as a user calls it: in processes of its own, alone and as ranks, killed and repeated."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from rdm_scale.data.manifest import read_manifest
from tests.support.encoding_jobs import contents
from tests.support.forked import Result, Running
from tests.support.limits import HANG_S
from tests.support.rank_pool import free_port

TOOL = Path(__file__).parents[2] / "tools/encode_latents.py"
COUNT = 60
SHARDS = ("--codec", "identity", "--size", "16", "--samples-per-member", "1", "--members-per-shard", "2")


@pytest.fixture
def call(tmp_path):
    """Calls the tool in one process or, with ranks=n, in n; the result is that of the first one."""

    def run(*arguments: object, ranks: int = 1) -> Result:
        calls = [Running(tmp_path, TOOL, arguments, rank, ranks) for rank in range(ranks)]
        first, *others = [one.result() for one in calls]
        assert all(other.returncode == 0 and not other.stdout for other in others), others
        return first

    return run


def png(scan: np.ndarray, size: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((scan.reshape(8, 8) * 15).astype(np.uint8)).resize((size, size)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("input") / "digits.tar"
    with tarfile.open(path, "w") as tar:
        for index, (scan, label) in enumerate(list(zip(*load_digits(return_X_y=True), strict=True))[:COUNT]):
            for suffix, content in (("png", png(scan, 32)), ("cls", str(label).encode())):
                info = tarfile.TarInfo(f"{index}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """300 images, which make 150 shards of two."""
    folder = tmp_path_factory.mktemp("many")
    for index, scan in enumerate(load_digits(return_X_y=True)[0][:300]):
        (folder / f"{index}.png").write_bytes(png(scan, 8))
    return folder


@pytest.fixture(scope="module")
def alone(many, tmp_path_factory):
    """Output of one uninterrupted process."""
    tmp = tmp_path_factory.mktemp("alone")
    result = Running(tmp, TOOL, (many, tmp / "out", *SHARDS, "--holdout", tmp / "held")).result()
    assert result.returncode == 0, result.stderr
    found = contents(tmp / "out"), contents(tmp / "held")
    assert len(found[0]) > 100 and len(found[1]) > 5
    return found


def test_the_whole_command(digits, tmp_path, call):
    out, held, preview = tmp_path / "latents", tmp_path / "validation", tmp_path / "preview.png"
    command = (
        *(digits, out, "--codec", "digits", "--size", 32, "--latents", "moments", "--dtype", "bfloat16"),
        *("--holdout", held, "--holdout-share", 0.2, "--seed", 3, "--batch-size", 8, "--preview", preview),
    )
    result = call(*command)
    assert result.returncode == 0, result.stderr
    (train, _), (validation, _) = read_manifest(str(out)), read_manifest(str(held))
    assert train.samples + validation.samples == COUNT and validation.samples > 0
    assert (train.kind, train.dtype, train.shape) == ("moments", "bfloat16", (4, 1, 8, 8))
    assert f"{digits}: {COUNT} images, 10 classes\n" in result.stdout
    assert f"{out}/manifest.json: {train.samples} samples, latents [4, 1, 8, 8]" in result.stdout
    assert f"{held}/manifest.json: {validation.samples} samples" in result.stdout
    assert "standard deviation 1." in result.stdout or "standard deviation 0.9" in result.stdout
    assert f"{COUNT}/{COUNT}" in result.stderr and "samples/s" in result.stderr  # progress
    assert result.stderr.count("\r") < 5 and "warning" not in result.stderr

    # Originals above reconstructions: the halves of the picture are nearly the same.
    picture = np.asarray(Image.open(preview).convert("L")).astype(float)
    cells = picture[-2 * (64 + 8) - 8 :]
    above, below = cells[8 : 8 + 64], cells[8 + 64 + 8 : 8 + 64 + 8 + 64]
    assert np.abs(above - below).mean() < 6 and not np.array_equal(above, below)
    assert above[:, 8:72].min() < 60  # there is a digit

    before = contents(out) | contents(held)
    preview.unlink()
    again = call(*command)
    assert again.returncode == 0 and f"{out}/manifest.json: complete already, nothing to do\n" in again.stdout
    assert contents(out) | contents(held) == before and Image.open(preview).size == picture.shape[::-1]
    other = call(*command, "--seed", 4, "--codec", "/no/such/codec")  # refused before the codec is looked for
    (line,) = other.stderr.splitlines()
    assert other.returncode == 1 and f"{out} already holds encoded data, of other inputs or made with" in line
    assert line.endswith("(the inputs are the same, so settings differ)")
    assert contents(out) | contents(held) == before


def test_looking_at_what_was_encoded(digits, tmp_path, call):
    out = tmp_path / "out"
    assert call(digits, out, "--codec", "digits", "--size", 32).returncode == 0
    result = call(out, "--verify")
    assert result.returncode == 0 and f"{COUNT} samples in 1 shards, all as they were written" in result.stdout
    result = call(out, "--stats")
    figures = read_manifest(str(out))[0].statistics
    assert result.returncode == 0 and len(figures.mean) == 4
    for channel, (mean, std) in enumerate(zip(figures.mean, figures.std, strict=True)):
        assert re.search(rf"^ +{channel} +{mean:.4f} +{std:.4f}$", result.stdout, re.MULTILINE)
    assert Image.open(out / "statistics.png").width > 300
    result = call(out, "--decode", 12)
    assert result.returncode == 0 and f"{out}/decoded.png: decoded samples" in result.stdout
    picture = np.asarray(Image.open(out / "decoded.png").convert("L")).astype(int)
    assert picture.shape == (2 * 72 + 8, 10 * 72 + 8) and picture[8:72, 8:72].min() < 60
    assert call(digits, out, "--codec", "digits", "--size", 32).stdout.endswith("complete already, nothing to do\n")
    content = bytearray((out / "shard-000000.tar").read_bytes())
    content[5000] ^= 1
    (out / "shard-000000.tar").write_bytes(content)
    result = call(out, "--verify")
    assert result.returncode == 1 and "is not what was written" in result.stdout
    assert result.stderr.splitlines()[-1] == f"encode_latents: error: {out}: 1 faults"


def test_clips_in_buckets(tmp_path, call):
    made = subprocess.run(
        [sys.executable, TOOL.parent / "make_digit_clips.py", tmp_path / "clips.tar", "--clips", "6", "--frames", "9"],
        check=False,
    )
    assert made.returncode == 0
    out = tmp_path / "out"
    sizes = ("--buckets", "4x16x16", "8x16x32", "--clip-step", 2)
    result = call(tmp_path / "clips.tar", out, "--codec", "identity", *sizes)
    assert result.returncode == 0 and "6 videos, 6 classes" in result.stdout
    assert "looking" in result.stderr and "6/6" in result.stderr
    manifest, _ = read_manifest(str(out))
    assert (manifest.samples, set(manifest.buckets)) == (6, {(3, 8, 16, 32)})
    assert manifest.shards[0].members[0].samples == 6
    result = call(out, "--decode", 3, "--picture", tmp_path / "some.png", "--fps", 12)
    assert result.returncode == 0 and f"{tmp_path}/some.gif: decoded samples" in result.stdout
    gif = Image.open(tmp_path / "some.gif")
    assert (gif.n_frames, gif.info["duration"]) == (8, 80)
    assert Image.open(tmp_path / "some.png").width == gif.width


def test_three_ranks_write_what_one_writes(many, alone, tmp_path, call):
    out, held = tmp_path / "out", tmp_path / "held"
    result = call(many, out, *SHARDS, "--holdout", held, ranks=3)
    assert result.returncode == 0, result.stderr
    assert (contents(out), contents(held)) == alone


def test_more_ranks_than_shards(digits, tmp_path, call):
    command = ("--codec", "identity", "--size", 16)
    assert call(digits, tmp_path / "a", *command, ranks=4).returncode == 0
    assert call(digits, tmp_path / "b", *command).returncode == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_under_torchrun(many, alone, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    command = [*torchrun, TOOL, many, tmp_path / "out", *SHARDS, "--holdout", tmp_path / "held"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("samples, latents [3, 1, 16, 16]") == 2 and result.stdout.count("300 images") == 1
    assert (contents(tmp_path / "out"), contents(tmp_path / "held")) == alone


def records_in(out: Path) -> list[Path]:
    """Records of the shards that are done; none when the whole job is."""
    return [path for path in out.glob(".encoding/train-*.json") if ".partial" not in path.name]


@pytest.mark.parametrize(("first", "then"), [(1, 3), (3, 2)])
def test_killed_in_the_middle_and_run_again(many, alone, tmp_path, call, first, then):
    for attempt in range(5):  # on a busy machine it may be done before it is killed
        out, held = tmp_path / f"out-{attempt}", tmp_path / f"held-{attempt}"
        command = (many, out, *SHARDS, "--holdout", held)
        running = [Running(tmp_path, TOOL, command, rank, first) for rank in range(first)]
        while not records_in(out) and running[0].process.is_alive():
            time.sleep(0.001)
        for one in running:
            with suppress(ProcessLookupError):
                os.kill(one.process.pid, signal.SIGKILL)
        codes = {one.result().returncode for one in running}
        if 0 < len(records_in(out)) < 130:  # of about 135
            break
    assert codes == {-signal.SIGKILL} and not (out / "manifest.json").exists()
    assert 0 < len(records_in(out)) < 130
    result = call(*command, ranks=then)
    assert result.returncode == 0, result.stderr
    assert (contents(out), contents(held)) == alone


def test_undecodable_inputs(digits, tmp_path, call):
    bad = bytearray(digits.read_bytes())
    with tarfile.open(digits) as tar:
        offset = tar.getmember("7.png").offset_data
    bad[offset : offset + 8] = b"\0" * 8
    (tmp_path / "bad.tar").write_bytes(bad)
    command = (tmp_path / "bad.tar", tmp_path / "out", "--codec", "identity", "--size", 32)
    result = call(*command)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "error" in line]
    assert line.startswith(f"encode_latents: error: 1 of {COUNT} inputs cannot be encoded, more than a share of 0.01")
    assert "bad.tar:7.png" in line
    (rejected,) = map(json.loads, (tmp_path / "out/rejected.jsonl").read_text().splitlines())
    assert rejected["input"].endswith("bad.tar:7.png") and "cannot decode the image" in rejected["reason"]
    result = call(*command, "--max-rejected", 0.02)
    assert (
        result.returncode == 0 and f"1 inputs could not be encoded: see {tmp_path}/out/rejected.jsonl" in result.stdout
    )
    manifest, _ = read_manifest(str(tmp_path / "out"))
    assert (manifest.samples, manifest.rejected) == (COUNT - 1, 1)


def test_wrong_usage_is_told_before_anything_is_read(tmp_path, call):
    encoding = ("no/input", tmp_path, "--codec", "identity")
    for wrong, message in (
        ((*encoding, "--size", 0), "less than 1"),
        ((*encoding, "--size", 32, "--holdout-share", 0.2), "needs --holdout"),
        ((*encoding, "--size", 32, "--holdout", "x", "--holdout-share", 1.5), "between 0 and 1"),
        ((*encoding, "--size", 32, "--holdout", "x", "--holdout-share", 0), "between 0 and 1"),
        ((*encoding, "--size", 32, "--preview", "x.gif"), "must end with .png"),
        (encoding, "give either --size or --buckets"),
        ((*encoding, "--size", 32, "--buckets", "8x8"), "give either --size or --buckets"),
        ((*encoding, "--frames", 8, "--buckets", "8x8"), "with --buckets the frames are part of a size"),
        (("no/input", tmp_path, "--size", 8), "--codec is needed"),
        (("no/input", "--codec", "identity", "--size", 8), "give INPUT and OUTPUT, not 1 paths"),
        (("no/input", tmp_path, "--verify"), "give OUTPUT, not 2 paths"),
        ((tmp_path, "--verify", "--stats"), "are two commands"),
        ((tmp_path, "--decode", 0), "less than 1"),
    ):
        result = call(*wrong)
        assert result.returncode == 2 and message in result.stderr, wrong


def test_errors_are_one_line(digits, tmp_path, call):
    for arguments, message in (
        (("no/input", tmp_path / "out", "--codec", "identity", "--size", 8), "does not exist"),
        ((digits, tmp_path / "out", "--codec", "nowhere", "--size", 8), "there is no codec"),
        ((digits, tmp_path / "out", "--codec", "identity", "--size", 8, "--latents", "moments"), "has no posterior"),
        ((digits, tmp_path / "out", "--codec", "identity", "--size", 8, "--frames", 2), "are for videos"),
        ((digits, tmp_path / "out", "--codec", "identity", "--buckets", "8by8"), "is not a size"),
        ((digits, tmp_path / "out", "--codec", "identity", "--size", 8, "--text-encoder", "x"), "has no captions"),
        ((digits, digits.parent, "--codec", "identity", "--size", 8), "is not empty"),
        ((tmp_path, "--verify"), "there is no manifest"),
    ):
        result = call(*arguments)
        assert result.returncode == 1 and message in result.stderr.splitlines()[-1], result.stderr
        assert result.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_warning_when_latents_are_far_from_unit_scale(tmp_path, call):
    (tmp_path / "in").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (120 + i, 120, 120)).save(tmp_path / f"in/{i}.png")
    result = call(tmp_path / "in", tmp_path / "out", "--codec", "identity", "--size", 8)
    assert result.returncode == 0 and "warning: diffusion expects a standard deviation near 1" in result.stderr
