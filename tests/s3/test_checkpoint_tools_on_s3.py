"""Checkpoint tools with s3:// sources and targets: merge, inspect, verify, grow, export and import."""

from typing import Any

import pytest
import torch

from rdm_scale.checkpoint import CheckpointDirectory, load_model
from rdm_scale.checkpoint.convert.checkpoint_writer import STATE_ENTRIES, write_checkpoint
from rdm_scale.checkpoint.convert.grow import grow_checkpoint
from rdm_scale.checkpoint.convert.import_weights import import_weights, open_published
from rdm_scale.checkpoint.convert.merge import export_diffusers, merge
from rdm_scale.checkpoint.model_source import open_model
from rdm_scale.checkpoint.summary import gates, summarize
from rdm_scale.checkpoint.verify import verify
from rdm_scale.codecs.record import CodecRecord
from rdm_scale.config import RunConfig, parse_config
from rdm_scale.errors import CheckpointError
from rdm_scale.models import build_model
from rdm_scale.storage.location import Location

STEP = 3
FILE_ELEMENTS = 10_000  # small, so that a checkpoint has several files


def run_config(**model: Any) -> RunConfig:
    size = {"channels": 3, "height": 8, "width": 8}
    base = {"input": size, "hidden_size": 24, "num_heads": 2, "depth": 2, "num_classes": 5}
    return parse_config({"model": base | model, "data": {"train": "none"}, "run": {"dir": "run"}}, "test")


def save(url: str, config: RunConfig) -> torch.nn.Module:
    """Save a checkpoint to `url`/checkpoints whose EMA weights are the returned model, without zeros."""
    model = build_model(config.model)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    state = {
        "step": STEP,
        "config": config.model_dump(mode="json"),
        "identity": config.identity(),
        "codec": CodecRecord(name="identity", location="identity").model_dump(mode="json"),
        "class_names": list("abcde"),
        "layout": {"tensor": 1, "pipeline": 1, "data": 1},
    }
    tensors = (
        (name, {entry: p + i for i, entry in enumerate(reversed(STATE_ENTRIES))})
        for name, p in model.named_parameters()
    )
    write_checkpoint(CheckpointDirectory(Location(f"{url}/checkpoints")), state, tensors, FILE_ELEMENTS)
    return model.eval().requires_grad_(False)


def output(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 3, 1, 8, 8, generator=generator)
    with torch.no_grad():
        return model(latents, torch.tensor([0.3, 0.8]), torch.tensor([1, 4]))


def assert_same_parameters(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    parameters = dict(found.named_parameters())
    assert parameters.keys() == dict(expected.named_parameters()).keys()
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameters[name], parameter), name


@pytest.mark.usefixtures("s3_environment")
def test_a_run_on_s3_is_merged_inspected_verified_and_grown(prefix: str) -> None:
    url = f"s3://latents/{prefix}"
    model = save(f"{url}/run", run_config())

    merge([open_model(f"{url}/run")], Location(f"{url}/merged"), max_file_bytes=100_000)
    assert len([name for name in Location(f"{url}/merged").names() if name.endswith(".safetensors")]) > 1
    assert_same_parameters(load_model(f"{url}/merged"), model)

    folder = CheckpointDirectory(Location(f"{url}/run/checkpoints")).folder(STEP)
    state, count, tensors = summarize(folder)
    assert (state["step"], count) == (STEP, len(list(model.parameters())))
    for tensor in tensors:
        parameter = model.get_parameter(tensor.name)
        assert tensor.norms["weights"] == pytest.approx((parameter + 3).norm().item(), rel=1e-5)
    assert len(list(gates(open_model(f"{url}/run")))) == 8  # a and b, of two branches of two blocks

    grown = grow_checkpoint(f"{url}/run", 5, f"{url}/grown")
    assert str(grown.folder) == f"{url}/grown/step_{STEP:08d}"
    deeper = load_model(f"{url}/grown").eval()
    assert len(list(deeper.parameters())) > count
    torch.testing.assert_close(output(deeper), output(model), atol=1e-5, rtol=1e-5)

    assert verify(folder) == verify(grown.folder) == []
    damaged = grown.folder / "rank_00000.safetensors"
    content = bytearray(damaged.read())
    content[-1] ^= 1  # of the EMA weights, which are stored last
    damaged.write(bytes(content))
    (problem,) = verify(grown.folder)
    assert f"{damaged} is damaged: bytes" in problem
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors is damaged"):
        load_model(f"{url}/grown")


@pytest.mark.usefixtures("s3_environment")
def test_weights_are_exported_and_imported_through_s3(prefix: str) -> None:
    url = f"s3://latents/{prefix}"
    model = save(f"{url}/run", run_config(residual="adaln_zero", timestep_spacing="diffusers"))
    export_diffusers(open_model(f"{url}/run"), Location(f"{url}/diffusers"))
    folder = import_weights(open_published(f"{url}/diffusers", None), Location(f"{url}/imported"))
    assert str(folder) == f"{url}/imported/step_00000000"
    for weights in ("ema", "weights"):
        assert_same_parameters(load_model(f"{url}/imported", weights=weights), model)


@pytest.mark.usefixtures("s3_environment")
def test_a_missing_bucket_is_reported(prefix: str) -> None:
    """Raises CheckpointError, which tools print as one line."""
    url, nowhere = f"s3://latents/{prefix}", f"s3://no-such-bucket/{prefix}"
    save(f"{url}/run", run_config())
    source = open_model(f"{url}/run")
    for work in (
        lambda: merge([source], Location(nowhere)),
        lambda: grow_checkpoint(f"{url}/run", 3, nowhere),
        lambda: open_model(nowhere),
        lambda: open_published(nowhere, None),
    ):
        with pytest.raises(CheckpointError, match="s3://no-such-bucket"):
            work()
