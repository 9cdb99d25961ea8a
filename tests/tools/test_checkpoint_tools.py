"""The command-line tools for checkpoints: merge, inspect, export to diffusers, import, and continue training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rdm_scale.checkpoint import load_model
from rdm_scale.checkpoint.convert.checkpoint_writer import write_checkpoint
from rdm_scale.checkpoint.directory import CheckpointDirectory
from rdm_scale.codecs.record import CodecRecord
from rdm_scale.models import build_model
from rdm_scale.storage.location import Location
from tests.support.forked import Result, Running
from tests.support.rank_pool import RankPool
from tests.support.small_runs import metrics, run_config, train, write_latents

TOOLS = Path("tools")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory with the checkpoints of two steps, as if an adaln_zero model had been trained."""
    here = tmp_path_factory.mktemp("run")
    data = write_latents(here / "latents")
    config = run_config(here, data, model__residual="adaln_zero", model__timestep_spacing="diffusers")
    for step in (1, 3):
        model = build_model(config.model, seed=step)
        state = {
            "step": step,
            "config": config.model_dump(mode="json"),
            "codec": CodecRecord(name="identity", location="identity").model_dump(mode="json"),
            "class_names": [f"class {i}" for i in range(4)],
            "layout": {"tensor": 2, "pipeline": 3, "data": 4},
        }
        tensors = ((name, {"weights": p + step, "ema": p}) for name, p in model.named_parameters())
        write_checkpoint(CheckpointDirectory(Location(here / "run" / "checkpoints")), state, tensors)
    (here / "run" / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return here


def tool(tmp_path: Path, name: str, *arguments: object) -> Result:
    return Running(tmp_path, TOOLS / f"{name}.py", arguments).result()


def test_merge_average_and_inspect(run: Path, tmp_path: Path) -> None:
    out, step = tmp_path / "out", run / "run" / "checkpoints" / "step_00000001"
    done = tool(tmp_path, "merge_checkpoint", run / "run", out, "--weights", "raw", "--dtype", "bf16")
    assert done.returncode == 0 and f"the raw weights of step 3 are in {out}" in done.stdout
    stored = load_file(out / "model.safetensors")["head.out.bias"]
    assert stored.dtype == torch.bfloat16 and (stored == 3).all()
    assert json.loads((out / "config.json").read_text())["step"] == 3

    done = tool(tmp_path, "merge_checkpoint", "--average", step, run / "run", tmp_path / "mean", "--weights", "raw")
    assert done.returncode == 0 and "the mean of 2 checkpoints" in done.stdout
    assert (load_model(str(tmp_path / "mean")).get_parameter("head.out.bias") == 2).all()

    done = tool(tmp_path, "merge_checkpoint", "--inspect", step)
    assert '"pipeline": 3' in done.stdout and "head.out.bias  [16]  weights 4  ema 0" in done.stdout

    assert "is intact" in tool(tmp_path, "merge_checkpoint", "--verify", step).stdout


def test_exported_weights_are_imported_and_trained(run: Path, tmp_path: Path, ranks: RankPool) -> None:
    checkpoints = tmp_path / "imported"
    config = run / "run" / "config.yaml"
    done = tool(tmp_path, "merge_checkpoint", run / "run", tmp_path / "dit", "--to", "diffusers")
    assert done.returncode == 0
    assert (
        'warning: diffusers\' DiTPipeline takes class 1000 for "no class", and this model has 4 classes' in done.stdout
    )
    done = tool(tmp_path, "import_checkpoint", tmp_path / "dit", checkpoints, config, "train.steps=2", "train.seed=11")
    assert done.returncode == 0, done.stderr
    fits = f"{config} train.steps=2 train.seed=11 checkpoint.start_from={checkpoints}/step_00000000\n"
    assert f"python -m rdm_scale.train {fits}" in done.stdout
    again = tool(tmp_path, "import_checkpoint", tmp_path / "dit", checkpoints, config)
    assert again.returncode == 1 and "already holds checkpoints (step 0)" in again.stderr
    changes: dict[str, Any] = {
        "model__residual": "adaln_zero",
        "model__timestep_spacing": "diffusers",
        "train__steps": 2,
        "train__seed": 11,  # imported weights bind a run to their model only
        "checkpoint__start_from": f"{checkpoints}/step_00000000",
    }
    trained = run_config(tmp_path, str(run / "latents" / "manifest.json"), **changes)
    ranks.run(1, train, trained)
    first = metrics(tmp_path / "run")[0]
    from_scratch = run_config(tmp_path / "scratch", str(run / "latents" / "manifest.json"), **changes | {
        "checkpoint__start_from": None, "train__steps": 1,
    })  # fmt: skip
    ranks.run(1, train, from_scratch)
    other = metrics(tmp_path / "scratch" / "run")[0]
    assert (first["step"], first["samples"]) == (1, 8)
    imported = dict(build_model(trained.model, seed=3).named_parameters())
    moved = load_model(str(tmp_path / "run")).get_parameter("blocks.0.mlp.branch.up.weight")
    distance = (moved - imported["blocks.0.mlp.branch.up.weight"]).abs().max()
    assert distance < 0.01  # two small steps away from what was imported, which is not what seed 11 makes
    scratch = load_model(str(tmp_path / "scratch" / "run")).get_parameter("blocks.0.mlp.branch.up.weight")
    assert (scratch - imported["blocks.0.mlp.branch.up.weight"]).abs().max() > 0.1
    assert other["step"] == 1


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("merge_checkpoint", ["RUN"], "give a checkpoint and the folder to write"),
        ("merge_checkpoint", ["RUN", "RUN", "x"], "or several checkpoints with --average"),
        ("merge_checkpoint", ["nowhere", "x"], "nowhere is neither a complete checkpoint nor a run"),
        ("merge_checkpoint", ["RUN", "RUN"], "is not empty"),
        ("merge_checkpoint", ["--verify", "nowhere"], "nowhere is neither a complete checkpoint nor a run"),
        ("merge_checkpoint", ["RUN", "x", "--max-file-gb", "0"], "--max-file-gb must be above 0"),
        ("import_checkpoint", ["nowhere", "x"], "give a configuration too"),
        ("import_checkpoint", ["RUN", "x"], "nothing has to be imported: train with checkpoint.start_from="),
    ],
)
def test_mistakes_are_reported_in_one_line(
    run: Path, tmp_path: Path, name: str, arguments: list[str], message: str
) -> None:
    done = tool(tmp_path, name, *(str(run / "run") if a == "RUN" else a for a in arguments))
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_verification_fails_with_the_damaged_bytes(run: Path, tmp_path: Path) -> None:
    step = run / "run" / "checkpoints" / "step_00000001"
    data = step / "rank_00000.safetensors"
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    try:
        done = tool(tmp_path, "merge_checkpoint", "--verify", step)
    finally:
        content[1000] ^= 1
        data.write_bytes(content)
    assert done.returncode == 1 and "has 1 blocks that are damaged or not finite" in done.stderr
    header = 8 + int.from_bytes(content[:8], "little")
    assert f"{data} is damaged: bytes {header} to" in done.stderr
