"""Weights exported to diffusers and imported again, compared with diffusers' own model; and refused imports."""

import argparse
import json
import zipfile
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rdm_scale.checkpoint import CheckpointDirectory, load_model
from rdm_scale.checkpoint.convert.checkpoint_writer import write_checkpoint
from rdm_scale.checkpoint.convert.import_weights import import_weights, open_published
from rdm_scale.checkpoint.convert.merge import export_diffusers
from rdm_scale.checkpoint.model_source import open_model
from rdm_scale.codecs.record import CodecRecord
from rdm_scale.config import ModelConfig, RunConfig, parse_config
from rdm_scale.errors import CheckpointError
from rdm_scale.models import build_model
from rdm_scale.storage.location import Location
from tests.support.rounding import assert_close_up_to_rounding, evaluate

MODEL: dict[str, Any] = {
    "input": {"channels": 3, "height": 8, "width": 8},
    "hidden_size": 24,
    "num_heads": 3,
    "depth": 2,
    "num_classes": 5,
    "residual": "adaln_zero",
    "timestep_spacing": "diffusers",
}


def run_config(**model: Any) -> RunConfig:
    tree = {"model": MODEL | model, "data": {"train": "none"}, "run": {"dir": "run"}}
    if model.get("learned_variance"):
        tree["diffusion"] = {"objective": "ddpm"}
    return parse_config(tree, "test")


def random_model(config: ModelConfig) -> torch.nn.Module:
    """A model without zeros, so that a missing parameter is noticed."""
    model = build_model(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval().requires_grad_(False)


def saved(tmp_path: Path, config: RunConfig) -> tuple[torch.nn.Module, Location]:
    model = random_model(config.model)
    state = {
        "step": 9,
        "config": config.model_dump(mode="json"),
        "codec": CodecRecord(name="identity", location="identity").model_dump(mode="json"),
        "class_names": list("abcde"),
        "layout": {"tensor": 1},
    }
    tensors = ((name, {"weights": p + 1, "ema": p}) for name, p in model.named_parameters())
    return model, write_checkpoint(CheckpointDirectory(Location(tmp_path / "run")), state, tensors)


def inputs(batch: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(batch, 3, 1, 8, 8, generator=generator)
    return latents, torch.tensor([0.0, 17.5, 400.0, 999.0]), torch.tensor([0, 4, 5, 2])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    here = tmp_path_factory.mktemp("exported")
    model, folder = saved(here, run_config(learned_variance=True))
    export_diffusers(open_model(str(folder)), Location(here / "dit"), max_file_bytes=50_000)
    return model, here / "dit"


def test_diffusers_computes_the_same(exported: tuple[torch.nn.Module, Path]) -> None:
    from diffusers import DiTTransformer2DModel

    model, folder = exported
    assert len(list(folder.glob("diffusion_pytorch_model-*.safetensors"))) > 1
    theirs = DiTTransformer2DModel.from_pretrained(folder).eval()
    latents, t, labels = inputs()
    expected = evaluate(theirs, lambda model, x: model(x[:, :, 0], t.to(x), labels).sample, latents)
    found = model(latents, t, labels)[:, :, 0]
    assert found.shape == (4, 6, 8, 8) and expected.exact.std() > 0.1
    assert_close_up_to_rounding(found, expected)


def test_an_exported_folder_is_imported_again(exported: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    model, folder = exported
    out = import_weights(open_published(str(folder), None), Location(tmp_path / "checkpoints"))
    assert out.name == "step_00000000"
    state, reader = CheckpointDirectory(Location(tmp_path / "checkpoints")).open(0)
    assert state["config"]["model"]["learned_variance"] and state["config"]["diffusion"]["objective"] == "ddpm"
    for name, parameter in model.named_parameters():
        assert torch.equal(reader.read("weights", name), parameter), name
        assert torch.equal(reader.read("ema", name), parameter)
        assert not reader.read("exp_avg", name).any() and not reader.read("exp_avg_sq", name).any()
    latents, t, labels = inputs()
    assert torch.equal(load_model(str(tmp_path / "checkpoints"))(latents, t, labels), model(latents, t, labels))


def test_a_model_saved_by_diffusers_is_imported(tmp_path: Path) -> None:
    from diffusers import DiTTransformer2DModel

    theirs = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=3, num_layers=2, sample_size=8,
        patch_size=4, num_embeds_ada_norm=5, norm_eps=1e-6,
    ).eval()  # fmt: skip
    first = theirs.transformer_blocks[0].norm1.emb
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(first.state_dict())
    theirs.save_pretrained(tmp_path / "pipeline" / "transformer")
    import_weights(open_published(str(tmp_path / "pipeline"), None), Location(tmp_path / "out"))
    latents, t, labels = inputs()
    expected = evaluate(theirs, lambda model, x: model(x[:, :, 0], t.to(x), labels).sample, latents)
    assert_close_up_to_rounding(load_model(str(tmp_path / "out"))(latents, t, labels)[:, :, 0], expected)


def original(model: torch.nn.Module, config: ModelConfig) -> dict[str, Tensor]:
    """The state dict of the original DiT, converted independently of the package."""
    ours = {name: p.clone() for name, p in model.named_parameters()}
    heads, size = config.num_heads, config.hidden_size // config.num_heads
    found = {"pos_embed": model.pos_spatial[None].clone()}
    for theirs, mine in {
        "x_embedder.proj": "patch_embed",
        "t_embedder.mlp.0": "timestep_embed.hidden",
        "t_embedder.mlp.2": "timestep_embed.out",
        "y_embedder.embedding_table": "class_embed",
        "final_layer.adaLN_modulation.1": "head.modulation",
        "final_layer.linear": "head.out",
        **{f"blocks.{i}.{a}": f"blocks.{i}.{b}" for i in range(config.depth) for a, b in (
            ("attn.proj", "attention.branch.out"), ("mlp.fc1", "mlp.branch.up"), ("mlp.fc2", "mlp.branch.down"),
            ("adaLN_modulation.1", "modulation"), ("attn.qkv", "attention.branch.qkv"),
        )},
    }.items():  # fmt: skip
        for leaf in ("weight", "bias"):
            if f"{mine}.{leaf}" not in ours:
                continue
            value = ours[f"{mine}.{leaf}"]
            if theirs.endswith("qkv"):  # rows (q/k/v, head, channel) from rows (head, q/k/v, channel)
                rows = [(h * 3 + x) * size + c for x in range(3) for h in range(heads) for c in range(size)]
                value = value[rows]
            found[f"{theirs}.{leaf}"] = value
    found["x_embedder.proj.weight"] = found["x_embedder.proj.weight"].view(config.hidden_size, 3, 2, 2)
    return found


@pytest.mark.parametrize("kind", ["dit.safetensors", "dit.pt", "nested.pt"])
def test_files_of_the_original_dit_are_imported(tmp_path: Path, kind: str) -> None:
    config = run_config(timestep_spacing="dit")
    model = random_model(config.model)
    state = original(model, config.model)
    if kind.endswith(".pt"):
        torch.save({"ema": state, "opt": {}} if kind == "nested.pt" else state, tmp_path / kind)
    else:
        save_file(state, tmp_path / kind)
    import_weights(open_published(str(tmp_path / kind), config.model), Location(tmp_path / "out"), config)
    latents, t, labels = inputs()
    assert torch.equal(load_model(str(tmp_path / "out"))(latents, t, labels), model(latents, t, labels))


def test_what_training_loops_save_is_imported(tmp_path: Path) -> None:
    """DiT's own loop, DistributedDataParallel, torch.compile of the model or of each block, and a mix of them."""
    config = run_config(timestep_spacing="dit").model
    model = random_model(config)
    state = original(model, config)
    other = {name: tensor + 1 for name, tensor in state.items()}
    options = argparse.Namespace(model="DiT-S/2", lr=1e-4, nested=argparse.Namespace(x=[1]))
    for name, content in {
        "train.pt": {"model": other, "ema": state, "opt": {"state": {0: {"step": 3}}}, "args": options},
        "ddp.pt": {f"module.{name}": tensor for name, tensor in state.items()},
        "compiled.pt": {"model": {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()}},
        "blocks.pt": {
            name.replace("blocks.0.", "blocks.0._orig_mod.").replace("mlp.", "mlp._fsdp_wrapped_module."): tensor
            for name, tensor in state.items()
        },
    }.items():
        torch.save(content, tmp_path / name)
    save_file({f"module.{name}": t.clone() for name, t in state.items()}, tmp_path / "ddp.safetensors")
    for name in ("train.pt", "ddp.pt", "compiled.pt", "blocks.pt", "ddp.safetensors"):
        found = dict(open_published(str(tmp_path / name), config).stream())
        assert all(torch.equal(found[key], parameter) for key, parameter in model.named_parameters()), name
    raw = open_published(str(tmp_path / "train.pt"), config, "raw")
    assert torch.equal(raw.convert("head.out.bias"), model.get_parameter("head.out.bias") + 1)

    torch.save(state | {"module.x_embedder.proj.bias": torch.zeros(24)}, tmp_path / "twice.pt")
    with pytest.raises(CheckpointError, match=r"holds x_embedder.proj.bias twice, as x_embedder.proj.bias and module"):
        open_published(str(tmp_path / "twice.pt"), config)
    torch.save({"model": state, "args": options, "where": Path("here")}, tmp_path / "path.pt")
    with torch.serialization.safe_globals([PosixPath]), pytest.raises(CheckpointError) as refused:  # as libraries do
        open_published(str(tmp_path / "path.pt"), config)
    assert "it contains an object of the class pathlib.PosixPath. Save the weights alone" in str(refused.value)
    assert "\x1b" not in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_needs_a_configuration_that_fits(tmp_path: Path) -> None:
    config = run_config(timestep_spacing="dit")
    save_file(original(random_model(config.model), config.model), tmp_path / "dit.safetensors")
    path = str(tmp_path / "dit.safetensors")
    with pytest.raises(CheckpointError, match="does not contain the number of heads: give a configuration"):
        open_published(path, None)
    with pytest.raises(
        CheckpointError, match=r"model.timestep_spacing: dit in the weights, diffusers in the configuration"
    ):
        open_published(path, run_config().model)
    with pytest.raises(CheckpointError, match=r"lacks blocks.2.attn.qkv.weight.* and 5 more"):
        open_published(path, run_config(timestep_spacing="dit", depth=3).model)
    with pytest.raises(CheckpointError, match=r"it has unknown tensors: blocks.1"):
        open_published(path, run_config(timestep_spacing="dit", depth=1).model)
    with pytest.raises(CheckpointError, match=r"y_embedder.embedding_table.weight \[6, 24\] instead of \[8, 24\]"):
        open_published(path, run_config(timestep_spacing="dit", num_classes=7).model)


def altered(folder: Path, tmp_path: Path, tensors: dict[str, Tensor | None], config: dict[str, Any]) -> str:
    """A copy of an exported folder in one file, with some tensors replaced or (None) left out."""
    state = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    state = {name: t for name, t in (state | tensors).items() if t is not None}
    save_file(
        {name: t.contiguous().clone() for name, t in state.items()}, tmp_path / "diffusion_pytorch_model.safetensors"
    )
    tree = json.loads((folder / "config.json").read_text()) | config
    (tmp_path / "config.json").write_text(json.dumps(tree))
    return str(tmp_path)


EMBEDDER = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({EMBEDDER: torch.ones(24)}, {}, rf"{EMBEDDER} differs from transformer_blocks.0"),
        ({"proj_out_1.bias": None}, {}, "lacks proj_out_1.bias"),
        ({"strange": torch.ones(1)}, {}, "has unknown tensors: strange"),
        ({"proj_out_1.bias": torch.ones(47)}, {}, r"proj_out_1.bias \[47\] instead of \[48\]"),
        ({}, {"activation_fn": "geglu"}, "activation_fn='geglu'"),
        ({}, {"_class_name": "FluxTransformer2DModel"}, "_class_name='FluxTransformer2DModel'"),
        ({}, {"num_layers": 60000}, "describes 60,000 blocks, but there are only"),
        ({}, {"num_layers": 10**12}, "num_layers=1000000000000"),
        ({}, {"attention_head_dim": 4096}, r"instead of \[12288"),
        ({}, {"out_channels": 4}, "out_channels=4 must be in_channels or twice that"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    exported: tuple[torch.nn.Module, Path],
    tmp_path: Path,
    tensors: dict[str, Any],
    config: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_published(altered(exported[1], tmp_path, tensors, config), None)


class Bomb:
    def __reduce__(self) -> Any:
        return (Path("executed").touch, ())


def test_pickled_objects_are_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = run_config(timestep_spacing="dit").model
    state = {"x_embedder.proj.weight": torch.zeros(24)}
    torch.save(state | {"bomb": Bomb()}, "bomb.pt")
    torch.save(state, "old.pt", _use_new_zipfile_serialization=False)
    torch.save(state, "plain.pt")
    with zipfile.ZipFile("plain.pt") as plain, zipfile.ZipFile("small.pt", "w", zipfile.ZIP_DEFLATED) as small:
        for entry in plain.infolist():
            small.writestr(entry.filename, plain.read(entry))
    torch.save([torch.zeros(3)], "list.pt")
    for name, message in (
        ("bomb.pt", "nothing else is loaded or executed"),
        ("old.pt", "not a plain file of tensors"),
        ("small.pt", "it is compressed"),
        ("list.pt", "does not hold a dictionary of names and dense tensors"),
        ("absent.pt", "there is no file"),
        ("x.ckpt", "neither a folder of diffusers nor a"),
    ):
        with pytest.raises(CheckpointError, match=message):
            open_published(name, model)
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"residual": "neural_rdm"}, "model.residual=neural_rdm has no adaLN-Zero blocks"),
        ({"timestep_spacing": "dit"}, "timestep frequencies with i/127"),
        ({"base_depth": 1}, "model.base_depth=1: it does not scale its branches"),
        ({"mlp_ratio": 2.0}, "its ratio is always 4"),
        ({"condition": "none"}, "it supports class labels only"),
        (
            {"input": {"channels": 3, "frames": 2, "height": 8, "width": 8}},
            "model.input.frames=2: it supports images",
        ),
        ({"input": {"channels": 3, "height": 8, "width": 4}}, "8 x 4 with patches 2 x 2 is not square"),
    ],
)
def test_models_that_diffusers_cannot_express_are_refused(tmp_path: Path, model: dict[str, Any], reason: str) -> None:
    _, folder = saved(tmp_path, run_config(**model))
    with pytest.raises(CheckpointError, match=rf"(?s){reason}.*RDMPipeline"):
        export_diffusers(open_model(str(folder)), Location(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
