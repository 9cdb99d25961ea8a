"""The steps of the README with a folder of PNGs: encode, train, sample and evaluate, each by its command."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.support.limits import HANG_S

ENVIRONMENT = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], env=ENVIRONMENT, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, latents and a run of four steps on them."""
    here = tmp_path_factory.mktemp("own")
    random = np.random.default_rng(0)
    for name, shade in (("cats", 60), ("dogs", 190)):
        (here / "images" / name).mkdir(parents=True)
        for i in range(24):
            pixels = random.integers(shade - 40, shade + 40, (20, 26, 3), np.uint8)
            Image.fromarray(pixels).save(here / "images" / name / f"{i}.png")
    encode = [
        "tools/encode_latents.py",
        str(here / "images"),
        str(here / "latents"),
        "--codec",
        "identity",
        "--size",
        "8",
    ]
    output = run(*encode, "--holdout", str(here / "validation"), "--preview", str(here / "preview.png"))
    assert "[3, 1, 8, 8]" in output and (here / "preview.png").exists()
    config = {
        "model": {
            "input": {"channels": 3, "height": 8, "width": 8},
            "hidden_size": 32,
            "num_heads": 2,
            "depth": 2,
            "num_classes": 2,
        },
        "sampling": {"steps": 3, "guidance": 2.0},
        "data": {"train": str(here / "latents"), "validation": str(here / "validation")},
        "train": {"steps": 4, "global_batch_size": 8},
        "monitor": {"validate_every": 2, "sample_every": 2, "log_every": 1},
        "run": {"dir": str(here / "run")},
    }
    (here / "mine.yaml").write_text(yaml.safe_dump(config))
    run("-m", "rdm_scale.train", str(here / "mine.yaml"))
    return here


def test_the_run_directory_holds_what_is_promised(trained: Path) -> None:
    run_dir = trained / "run"
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4] and [r["samples"] for r in records] == [8, 16, 24, 32]
    assert [r["step"] for r in records if "validation_loss" in r] == [2, 4]
    assert all(r["data_wait_s"] >= 0 and r["tokens_per_s"] > 0 for r in records)
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["model"]["depth"] == 2
    for step in (2, 4):
        assert Image.open(run_dir / "samples" / f"step_{step:08d}.png").width > 100
    assert list((run_dir / "tensorboard").iterdir()) and (run_dir / "checkpoints/step_00000004/commit.json").exists()


def test_samples_are_drawn_from_the_run(trained: Path) -> None:
    out = trained / "samples.png"
    output = run("tools/sample.py", str(trained / "run"), str(out), "--rows", "3", "--labels", "1,0", "--steps", "2")
    assert f"6 samples of step 4 are in {out}" in output
    columns_two_rows_three = Image.open(out)
    assert columns_two_rows_three.width < columns_two_rows_three.height


def test_samples_of_the_run_are_evaluated(trained: Path) -> None:
    options = ["--per-class", "2", "--neighbours", "1", "--picture", str(trained / "drawn.png"), "--rows", "1"]
    options += ["--features", "digits"]
    output = run("tools/evaluate.py", str(trained / "run"), str(trained / "images"), *options)
    assert re.search(r"label accuracy: [\d.]+ % of 4 samples of step 4", output), output
    assert re.search(
        r"FD\(digits\): [\d.e+]+ of 4 samples \(floor [\d.e+-]+: 4 real samples from the others\)", output
    ), output
    assert f"samples: {trained}/drawn.png" in output and Image.open(trained / "drawn.png").width > 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "x.png"], "nowhere is neither a complete checkpoint nor a run"),
        (["RUN", "x.png", "--labels", "0-2"], "--labels 0-2: labels lie between 0 and 1"),
        (["RUN", "x.png", "--labels", "cat"], "write it as 0-9 or 3,207,360"),
        (["RUN", "x.png", "--sampler", "ddim"], "choose euler or heun"),
        (["RUN", "missing/x.png"], "there is no folder missing"),
        (["RUN", "x.png", "--rows", "0"], "--rows and --batch-size must be at least 1"),
    ],
)
def test_errors_are_one_line(trained: Path, arguments: list[str], message: str) -> None:
    arguments = [str(trained / "run") if a == "RUN" else a for a in arguments]
    command = [sys.executable, "tools/sample.py", *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
