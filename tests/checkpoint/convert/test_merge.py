"""Merged folders: read by this project and by safetensors, averaged, and removed after a failure."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rdm_scale.checkpoint import load_model, load_trained
from rdm_scale.checkpoint.convert.merge import merge
from rdm_scale.checkpoint.model_source import open_model
from rdm_scale.errors import CheckpointError
from rdm_scale.models import build_model
from rdm_scale.sampling.rdm_pipeline import RDMPipeline
from rdm_scale.storage.location import Location
from tests.support.saved_models import CODEC, checkpoint_of, damaged_bytes, flip, run_config, save_model


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
    merge([open_model(checkpoint_of(run, 1), "weights")], Location(tmp_path / "out"), torch.bfloat16)
    model = build_model(run_config().model, seed=1)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, p in model.named_parameters():
        assert torch.equal(stored[name], (p + 1 + 1).bfloat16())
    assert load_model(str(tmp_path / "out")).get_parameter("head.out.bias").dtype == torch.float32


def test_averages_are_the_mean_of_the_sources(run: Location, tmp_path: Path) -> None:
    merge([open_model(checkpoint_of(run, n)) for n in (1, 2, 6)], Location(tmp_path / "out"))
    models = [dict(build_model(run_config().model, seed=n).named_parameters()) for n in (1, 2, 6)]
    averaged = load_model(str(tmp_path / "out"))
    for name, parameter in averaged.named_parameters():
        torch.testing.assert_close(parameter, sum(m[name] for m in models) / 3 + 3)  # (1 + 2 + 6) / 3
    again = open_model(str(tmp_path / "out"))  # a merged folder is also a source
    merge([again, open_model(checkpoint_of(run, 6))], Location(tmp_path / "second"))
    assert load_model(str(tmp_path / "second")).get_parameter("head.out.bias")[0].item() == pytest.approx(4.5)


def test_different_models_are_not_averaged(run: Location, tmp_path: Path) -> None:
    save_model(Location(tmp_path / "other"), 3, run_config(num_heads=4, num_classes=6))
    with pytest.raises(CheckpointError, match=r"differ in model.num_heads, model.num_classes"):
        merge([open_model(checkpoint_of(run, 1)), open_model(str(tmp_path / "other"))], Location(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_after_a_damaged_source(run: Location, tmp_path: Path) -> None:
    flip(Path(checkpoint_of(run, 6)) / "rank_00002.safetensors", 20_000)
    with pytest.raises(CheckpointError) as raised:
        merge([open_model(checkpoint_of(run, 6))], Location(tmp_path / "out"))
    begin, end = damaged_bytes("rank_00002.safetensors", str(raised.value))
    assert begin <= 20_000 < end
    assert not (tmp_path / "out").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("x")
    with pytest.raises(CheckpointError, match="taken is not empty"):
        merge([open_model(checkpoint_of(run, 1))], Location(tmp_path / "taken"))
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["mine.txt"]


def test_the_pipeline_samples_from_a_merged_folder(run: Location, tmp_path: Path) -> None:
    merge([open_model(checkpoint_of(run, 1))], Location(tmp_path / "out"))
    pipe = RDMPipeline.from_pretrained(str(tmp_path / "out"), codec="identity")
    images = pipe(class_labels=[0, 4, 5], num_inference_steps=2, guidance_scale=1.5, seed=3)
    assert [image.size for image in images] == [(8, 8)] * 3
    latents = RDMPipeline.from_pretrained(str(tmp_path / "out"))
    one, two, three = (
        latents(class_labels=[1], num_inference_steps=2, generator=torch.Generator().manual_seed(n)) for n in (7, 7, 8)
    )
    assert one.shape == (1, 3, 1, 8, 8) and torch.equal(one, two) and not torch.equal(one, three)
