"""Runs, shards, checkpoints and merged weights of version 0.1.0: they are read, and give the numbers that they gave.

`fixtures/written_before/README.md` says what wrote them. The commands work in a copy of that folder, two at a time,
with the relative paths that its configurations name. Beside commands, only the public Python API is used.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rdm_scale.checkpoint import load_model, load_trained
from rdm_scale.config import flatten, load_config
from rdm_scale.data import LatentStream
from rdm_scale.models import build_model
from tests.support.limits import HANG_S

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests/fixtures/written_before"
GOLDEN = FIXTURES / "golden"  # what version 0.1.0 made of the fixtures
SETS = ("digits/train", "digits/validation", "captions", "clips/train", "clips/validation")
BATCH = 4
STEPS_READ = 12  # the largest set has 48 samples
LAYOUTS = {
    2: {"tensor": 2, "pipeline": 1, "data": 1},
    4: {"tensor": 1, "pipeline": 1, "data": 2},  # ZeRO stage 3
    6: {"tensor": 1, "pipeline": 2, "data": 1},
}  # by the step of a checkpoint of runs/digits
REPRODUCIBLE = ("step", "loss", "grad_norm", "lr", "samples", "validation_loss", "lost_shards", "lost_samples")

STEP = "runs/digits/checkpoints/step_{:08d}"
PREDICTED = [(STEP.format(step), weights) for step in LAYOUTS for weights in ("ema", "weights")] + [
    ("runs/clips", "ema"),
    ("merged/digits", "ema"),
    ("merged/captions", "weights"),
]

TRAIN = "-m rdm_scale.train"
TWO_RANKS = "-m torch.distributed.run --standalone --nproc_per_node=2"
ONE_RANK_AGAIN = "runs/digits/config.yaml parallel.pipeline=1"
COMMANDS = {
    "merge": f"tools/merge_checkpoint.py {STEP.format(6)} new/merged",
    "resumed digits": f"{TRAIN} {ONE_RANK_AGAIN} train.steps=10 parallel.zero_stage=2",
    "resumed clips": f"{TRAIN} runs/clips/config.yaml train.steps=6",
    "from step 2": f"{TRAIN} {ONE_RANK_AGAIN} train.steps=5 run.dir=new/2 checkpoint.resume={STEP.format(2)}",
    "from step 4": f"{TWO_RANKS} {TRAIN} {ONE_RANK_AGAIN} train.steps=7 run.dir=new/4 "
    f"checkpoint.resume={STEP.format(4)} parallel.tensor=2",
    "new digits": f"{TRAIN} digits.yaml train.steps=5 run.dir=new/digits",
    "new captions": f"{TRAIN} captions.yaml run.dir=new/captions",
    "inspect": f"tools/merge_checkpoint.py --inspect {STEP.format(2)}",
    "verify": f"tools/merge_checkpoint.py --verify {STEP.format(4)}",
    "verify captions": "tools/encode_latents.py sets/captions --verify",
    "sample": f"tools/sample.py {STEP.format(2)} samples.png --rows 1 --steps 2",
    "depth report": "tools/depth_report.py golden/digits --output depth.html",
}


@dataclass
class Commands:
    """The commands, running in the background in a copy of the fixtures."""

    folder: Path
    outputs: dict[str, Future[str]]

    def output(self, name: str) -> str:
        """What a command has printed, once it has ended."""
        return self.outputs[name].result()

    def metrics(self, name: str, directory: str) -> list[dict[str, Any]]:
        """The reproducible figures of each step of a run that a command has trained."""
        self.output(name)
        return reproducible(self.folder / directory / "metrics.jsonl")


def run(name: str, folder: Path) -> str:
    """Both outputs of a command that succeeds."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    words = COMMANDS[name].split(" ")
    command = [sys.executable, *(str(ROOT / word) if word.startswith("tools/") else word for word in words)]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=HANG_S)
    assert ended.returncode == 0, f"{name}:\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    folder = shutil.copytree(FIXTURES, tmp_path_factory.mktemp("written_before") / "copy")
    pool = ThreadPoolExecutor(max_workers=2)
    yield Commands(folder, {name: pool.submit(run, name, folder) for name in COMMANDS})
    pool.shutdown(cancel_futures=True)


def reproducible(metrics: Path) -> list[dict[str, Any]]:
    """The figures of each step that do not depend on time."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [{name: record[name] for name in REPRODUCIBLE if name in record} for record in records]


def golden(name: str, first: int, last: int) -> list[Any]:
    """The figures that the steps from `first` to `last` of a run had in version 0.1.0."""
    records = reproducible(GOLDEN / name / "metrics.jsonl")[first - 1 : last]
    assert [record["step"] for record in records] == list(range(first, last + 1))
    return [pytest.approx(record, rel=2e-6) for record in records]


def figures(tensor: Tensor) -> list[float]:
    """Mean, root mean square, and seven of the values of a tensor."""
    values = tensor.double().flatten()
    some = values[:: max(1, len(values) // 6)][:7]
    return [values.mean().item(), values.square().mean().sqrt().item(), *some.tolist()]


def read_set(name: str) -> list[dict[str, list[Any]]]:
    """Ids, labels and figures of the latents and captions of the first batches of a set."""
    captions = name == "captions"
    stream = LatentStream(FIXTURES / "sets" / name, global_batch_size=BATCH, seed=11, captions=captions)
    found = []
    for step in range(1, STEPS_READ + 1):
        batch = stream.batch(step)
        record = {"ids": batch.ids.tolist(), "labels": batch.labels.tolist(), "latents": figures(batch.latents)}
        if captions:
            text = batch.text
            record |= {"tokens": figures(text.tokens), "mask": text.mask.tolist(), "pooled": figures(text.pooled)}
        found.append(record)
    stream.close()
    return found


def predict(path: str, weights: str) -> list[float]:
    """Figures of what the model of a checkpoint or merged folder predicts for three samples."""
    trained = load_trained(str(FIXTURES / path), weights)
    size = trained.config.model.input
    shape = (3, size.channels, size.frames, size.height, size.width)
    latents = torch.arange(float(3 * size.channels * size.frames * size.height * size.width)).sin().view(shape)
    condition: Any = None
    if trained.config.model.condition == "class":
        condition = torch.tensor([0, 7, 10])
    elif trained.config.model.condition == "text":
        stream = LatentStream(FIXTURES / "sets/captions", global_batch_size=3, seed=11, captions=True)
        condition = stream.batch(1).text
    return figures(trained.model(latents, torch.tensor([1.0, 333.0, 999.0]), condition))


def write_golden() -> None:
    """Writes the golden figures of sets and predictions: called with version 0.1.0, and never again."""
    sets = {name: read_set(name) for name in SETS}
    predictions = {f"{path} {weights}": predict(path, weights) for path, weights in PREDICTED}
    (GOLDEN / "figures.json").write_text(json.dumps({"sets": sets, "predictions": predictions}, indent=1) + "\n")


@pytest.fixture(scope="module")
def golden_figures() -> dict[str, dict[str, Any]]:
    return json.loads((GOLDEN / "figures.json").read_text())


@pytest.mark.parametrize("name", SETS)
def test_samples_of_a_set(golden_figures: dict[str, dict[str, Any]], name: str) -> None:
    """The samples of a set come in the same order, with the same labels, latents and captions."""
    for read, expected in zip(read_set(name), golden_figures["sets"][name], strict=True):
        assert read.keys() == expected.keys()
        for what, values in expected.items():
            exact = what in ("ids", "labels", "mask")
            assert read[what] == (values if exact else pytest.approx(values, rel=1e-6, abs=1e-6)), what


@pytest.mark.parametrize(("path", "weights"), PREDICTED)
def test_predictions(golden_figures: dict[str, dict[str, Any]], path: str, weights: str) -> None:
    """Checkpoints of all layouts, and merged folders, predict what they did."""
    expected = golden_figures["predictions"][f"{path} {weights}"]
    assert predict(path, weights) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("step", LAYOUTS)
def test_facts_in_a_checkpoint(step: int) -> None:
    """A checkpoint says its step, configuration, codec and classes; the fixture is of the layout meant here."""
    folder = FIXTURES / STEP.format(step)
    assert json.loads((folder / "state.json").read_text())["layout"] == LAYOUTS[step]
    trained = load_trained(str(folder))
    assert trained.step == step
    assert trained.config.model == load_config(FIXTURES / "digits.yaml").model
    assert trained.codec.name == "digits"
    assert trained.class_names == tuple("0123456789")


def test_merged_weights() -> None:
    """A merged folder holds the parameters of the model under their names, equal to those in the checkpoint."""
    tensors = load_file(FIXTURES / "merged/digits/model.safetensors")
    built = build_model(load_config(FIXTURES / "runs/digits/config.yaml").model)
    assert {name: p.shape for name, p in built.named_parameters()} == {name: t.shape for name, t in tensors.items()}
    for path in ("merged/digits", "runs/digits"):  # the newest checkpoint of the run
        parameters = dict(load_model(str(FIXTURES / path)).named_parameters())
        assert all(torch.equal(parameters[name], tensor) for name, tensor in tensors.items()), path


def test_merging_again(commands: Commands) -> None:
    """Merging the checkpoint gives the merged folder of then."""
    assert "step 6" in commands.output("merge")
    then, now = FIXTURES / "merged/digits", commands.folder / "new/merged"
    old, new = (load_file(folder / "model.safetensors") for folder in (then, now))
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (then, now)]
    then_stated, now_stated = (dict(flatten(config)) for config in configs)
    assert then_stated == {name: now_stated.get(name) for name in then_stated}  # there may be new keys


@pytest.mark.parametrize(
    ("name", "directory", "golden_run", "first", "last"),
    [
        ("resumed digits", "runs/digits", "digits", 1, 10),
        ("resumed clips", "runs/clips", "clips", 1, 6),
        ("from step 2", "new/2", "digits", 3, 5),
        ("from step 4", "new/4", "digits", 5, 7),
    ],
)
def test_resumed_runs(commands: Commands, name: str, directory: str, golden_run: str, first: int, last: int) -> None:
    """A run goes on under another layout, in its directory or a new one, as it did in version 0.1.0.

    The run of clips knows from its checkpoint that a shard was lost, which the fixture has again.
    """
    assert commands.metrics(name, directory) == golden(golden_run, first, last)


def test_depth_profiles_go_on(commands: Commands) -> None:
    """A resumed run adds its profiles to those that are there."""
    commands.output("resumed digits")
    lines = (commands.folder / "runs/digits/depth.jsonl").read_text().splitlines()
    assert lines[:4] == (FIXTURES / "runs/digits/depth.jsonl").read_text().splitlines()
    expected = [json.loads(line) for line in (GOLDEN / "digits/depth.jsonl").read_text().splitlines()]
    for line, profile in zip(lines, expected, strict=True):
        found = json.loads(line)
        assert found == {name: pytest.approx(values, rel=1e-4, abs=1e-6) for name, values in profile.items()}


@pytest.mark.parametrize("name", ["digits", "captions"])
def test_new_runs(commands: Commands, name: str) -> None:
    """A configuration of then starts the run that it started then."""
    assert commands.metrics(f"new {name}", f"new/{name}") == golden(name, 1, 5)


def test_tools(commands: Commands) -> None:
    """The tools that look at data, checkpoints and runs take those of then."""
    inspected = commands.output("inspect")
    assert "step 2" in inspected and json.dumps(LAYOUTS[2]) in inspected
    names = load_file(FIXTURES / "merged/digits/model.safetensors")
    assert all(name in inspected for name in names)
    assert "is intact" in commands.output("verify")
    commands.output("verify captions")
    commands.output("sample")
    assert (commands.folder / "samples.png").read_bytes().startswith(b"\x89PNG")
    commands.output("depth report")
    assert "sensitivity" in (commands.folder / "depth.html").read_text()
