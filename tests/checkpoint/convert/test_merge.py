"""Merged folders: read by this project and by safetensors, averaged, and removed after a failure."""

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rdm_scale.checkpoint import CheckpointDirectory, load_model, load_trained
from rdm_scale.checkpoint.convert.checkpoint_writer import write_checkpoint
from rdm_scale.checkpoint.convert.merge import merge
from rdm_scale.checkpoint.model_source import open_model
from rdm_scale.checkpoint.summary import gates, summarize
from rdm_scale.checkpoint.verify import verify
from rdm_scale.codecs.record import CodecRecord
from rdm_scale.config import RunConfig, parse_config
from rdm_scale.errors import CheckpointError
from rdm_scale.models import build_model
from rdm_scale.sampling.rdm_pipeline import RDMPipeline
from rdm_scale.storage.location import Location

CODEC = CodecRecord(name="identity", location="identity")


def run_config(**model: Any) -> RunConfig:
    size = {"channels": 3, "height": 8, "width": 8}
    base = {"input": size, "hidden_size": 24, "num_heads": 2, "depth": 2, "num_classes": 5}
    return parse_config({"model": base | model, "data": {"train": "none"}, "run": {"dir": "run"}}, "test")


def save(directory: Location, step: int, config: RunConfig) -> torch.nn.Module:
    """Save a checkpoint whose EMA weights are the model of seed `step` plus `step`, and whose weights are one more."""
    model = build_model(config.model, seed=step)
    for p in model.parameters():
        p.data += step
    state = {
        "step": step,
        "config": config.model_dump(mode="json"),
        "codec": CODEC.model_dump(mode="json"),
        "class_names": list("abcde"),
        "layout": {"tensor": 2, "pipeline": 1, "data": 3},
    }
    tensors = ((name, {"weights": p + 1, "ema": p}) for name, p in model.named_parameters())
    write_checkpoint(CheckpointDirectory(directory), state, tensors, 3001)
    return model


@pytest.fixture
def run(tmp_path: Path) -> Location:
    folder = Location(tmp_path / "run" / "checkpoints")
    for step in (1, 2, 6):
        save(folder, step, run_config())
    return folder


def step(run: Location, number: int) -> str:
    return str(CheckpointDirectory(run).folder(number))


@pytest.mark.parametrize("max_bytes", [10**9, 10_000])
@pytest.mark.parametrize("out", ["local", "memory"])
def test_merged_weights_are_those_of_the_run(run: Location, tmp_path: Path, out: str, max_bytes: int) -> None:
    folder = Location(tmp_path / "out" if out == "local" else f"memory://{tmp_path}/out")
    done: list[int] = []
    merge([open_model(str(run.parent))], folder, max_file_bytes=max_bytes, progress=done.append)
    expected = dict(build_model(run_config().model, seed=6).named_parameters())
    assert sum(done) == sum(p.numel() for p in expected.values())
    loaded = load_trained(str(folder))
    assert (loaded.step, loaded.config, loaded.codec, loaded.class_names) == (6, run_config(), CODEC, tuple("abcde"))
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, expected[name] + 6)
    assert torch.equal(loaded.model.pos_spatial, build_model(run_config().model).pos_spatial)
    if out == "local":
        files = sorted((tmp_path / "out").glob("*.safetensors"))
        assert (len(files) > 3) == (max_bytes < 10**9)
        assert max_bytes == 10**9 or all(len(load_file(f)) == 1 or f.stat().st_size < 12_000 for f in files)
        for file in files:
            for name, tensor in load_file(file).items():
                assert torch.equal(tensor, expected.pop(name) + 6)
        assert not expected
        if len(files) > 1:
            index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
            assert all(name in load_file(tmp_path / "out" / file) for name, file in index["weight_map"].items())


def test_raw_weights_and_bf16(run: Location, tmp_path: Path) -> None:
    merge([open_model(step(run, 1), "weights")], Location(tmp_path / "out"), torch.bfloat16)
    model = build_model(run_config().model, seed=1)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, p in model.named_parameters():
        assert torch.equal(stored[name], (p + 1 + 1).bfloat16())
    assert load_model(str(tmp_path / "out")).get_parameter("head.out.bias").dtype == torch.float32


def test_averages_are_the_mean_of_the_sources(run: Location, tmp_path: Path) -> None:
    merge([open_model(step(run, n)) for n in (1, 2, 6)], Location(tmp_path / "out"))
    models = [dict(build_model(run_config().model, seed=n).named_parameters()) for n in (1, 2, 6)]
    averaged = load_model(str(tmp_path / "out"))
    for name, parameter in averaged.named_parameters():
        torch.testing.assert_close(parameter, sum(m[name] for m in models) / 3 + 3)  # (1 + 2 + 6) / 3
    again = open_model(str(tmp_path / "out"))  # a merged folder is also a source
    merge([again, open_model(step(run, 6))], Location(tmp_path / "second"))
    assert load_model(str(tmp_path / "second")).get_parameter("head.out.bias")[0].item() == pytest.approx(4.5)


def test_different_models_are_not_averaged(run: Location, tmp_path: Path) -> None:
    save(Location(tmp_path / "other"), 3, run_config(num_heads=4, num_classes=6))
    with pytest.raises(CheckpointError, match=r"differ in model.num_heads, model.num_classes"):
        merge([open_model(step(run, 1)), open_model(str(tmp_path / "other"))], Location(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def damaged_bytes(name: str, message: str) -> tuple[int, int]:
    found = re.search(rf"{name} is damaged: bytes ([\d,]+) to ([\d,]+) ", message)
    assert found, message
    begin, end = (int(number.replace(",", "")) for number in found.groups())
    return begin, end


def test_nothing_is_left_after_a_damaged_source(run: Location, tmp_path: Path) -> None:
    flip(Path(step(run, 6)) / "rank_00002.safetensors", 20_000)
    with pytest.raises(CheckpointError) as raised:
        merge([open_model(step(run, 6))], Location(tmp_path / "out"))
    begin, end = damaged_bytes("rank_00002.safetensors", str(raised.value))
    assert begin <= 20_000 < end
    assert not (tmp_path / "out").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("x")
    with pytest.raises(CheckpointError, match="taken is not empty"):
        merge([open_model(step(run, 1))], Location(tmp_path / "taken"))
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["mine.txt"]


def test_verification_names_every_damaged_block(run: Location) -> None:
    folder = Location(step(run, 2))
    assert verify(folder) == []
    flip(Path(folder.path) / "rank_00000.safetensors", 500)
    flip(Path(folder.path) / "rank_00003.safetensors", 5)
    first, second = verify(folder)
    begin, end = damaged_bytes("rank_00000.safetensors", first)
    assert begin <= 500 < end
    assert damaged_bytes("rank_00003.safetensors", second)[0] == 0  # its header
    flip(Path(folder.path) / "rank_00001.index.safetensors", 5)
    with pytest.raises(CheckpointError, match=r"rank_00001.index.safetensors is damaged"):
        verify(folder)


def test_summary_contains_norms_and_gates(run: Location) -> None:
    state, count, summaries = summarize(Location(step(run, 2)))
    model = build_model(run_config().model, seed=2)
    assert (state["layout"]["data"], count) == (3, len(list(model.parameters())))
    for summary in summaries:
        parameter = model.get_parameter(summary.name)
        assert summary.shape == tuple(parameter.shape)
        assert summary.norms["ema"] == pytest.approx((parameter + 2).norm().item(), rel=1e-5)
        assert summary.norms["weights"] == pytest.approx((parameter + 3).norm().item(), rel=1e-5)
    found = {gate.name: gate for gate in gates(open_model(step(run, 2)))}
    assert len(found) == 8  # a and b, of two branches of two blocks
    # a is 1 + 2, and m = 4^-1/2
    assert found["blocks.1.mlp.gate.a"].mean == 1.5 and found["blocks.1.mlp.gate.b"].largest == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"model": {"depth": 10**7}}}, "claims 10,000,000 blocks and holds only"),
        ({"config": {"model": {"hidden_size": 2**40}}}, "claims 16 tokens of width 1,099,511,627,776: impossible"),
        ({"config": {"model": {"num_classes": 2**62}}}, "claims an impossible model"),
        ({"config": {"model": {"hidden_size": 48}}}, r"head.out.bias|other shapes"),
        ({"config": {"model": {"depth": 1}}}, "which the model does not, blocks.1"),
        ({"codec": {"name": 3}}, "codec.name"),
        ({"format": "else"}, "nor a folder that tools/merge_checkpoint.py wrote"),
    ],
)
def test_a_folder_that_contradicts_its_configuration_is_refused(
    run: Location, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    merge([open_model(step(run, 1))], Location(tmp_path / "out"))
    path = tmp_path / "out" / "config.json"
    tree = json.loads(path.read_text())
    for key, value in change.items():
        if key == "config":
            tree["config"]["model"] |= value["model"]
        else:
            tree[key] = value
    path.write_text(json.dumps(tree))
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=message):
        load_model(str(tmp_path / "out"))
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


def test_the_pipeline_samples_from_a_merged_folder(run: Location, tmp_path: Path) -> None:
    merge([open_model(step(run, 1))], Location(tmp_path / "out"))
    pipe = RDMPipeline.from_pretrained(str(tmp_path / "out"), codec="identity")
    images = pipe(class_labels=[0, 4, 5], num_inference_steps=2, guidance_scale=1.5, seed=3)
    assert [image.size for image in images] == [(8, 8)] * 3
    latents = RDMPipeline.from_pretrained(str(tmp_path / "out"))
    one, two, three = (
        latents(class_labels=[1], num_inference_steps=2, generator=torch.Generator().manual_seed(n)) for n in (7, 7, 8)
    )
    assert one.shape == (1, 3, 1, 8, 8) and torch.equal(one, two) and not torch.equal(one, three)
