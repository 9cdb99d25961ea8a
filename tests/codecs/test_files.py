"""Codecs in the forms that people have them: variants, shards, pipelines and single files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from rdm_scale.codecs import CONFIG, INDEX, WEIGHTS, codec_of, load_codec
from rdm_scale.errors import DataError


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        latent_channels=2,
        norm_num_groups=2,
    )


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return tiny_vae()


def encoded(folder: Path) -> torch.Tensor:
    pixels = torch.rand(2, 3, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return load_codec(str(folder)).encode(pixels)


@pytest.fixture(scope="module")
def expected(vae: AutoencoderKL, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    folder = tmp_path_factory.mktemp("plain")
    vae.save_pretrained(folder)
    return encoded(folder)


@pytest.mark.parametrize("shard_size", ["10GB", "30KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("variant", [None, "fp16", "non_ema"])
def test_variants_and_shards(
    vae: AutoencoderKL, expected: torch.Tensor, tmp_path: Path, variant: str | None, shard_size: str
) -> None:
    vae.save_pretrained(tmp_path, variant=variant, max_shard_size=shard_size)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_size == "30KB") and (tmp_path / WEIGHTS).exists() == (
        variant is None and len(files) == 1
    )
    torch.testing.assert_close(encoded(tmp_path), expected, rtol=0, atol=0)


def test_half_precision_is_computed_in_full(vae: AutoencoderKL, expected: torch.Tensor, tmp_path: Path) -> None:
    tiny_vae().half().save_pretrained(tmp_path, variant="fp16")
    found = encoded(tmp_path)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


def test_the_weights_in_full_come_first_and_several_variants_are_listed(vae: AutoencoderKL, tmp_path: Path) -> None:
    for variant in ("fp16", "bf16"):
        vae.save_pretrained(tmp_path, variant=variant)
    with pytest.raises(DataError, match=r"but several variants \(bf16, fp16\): copy the one you want to a folder"):
        load_codec(str(tmp_path))
    vae.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"damaged")
    load_codec(str(tmp_path))


def test_a_pipeline_is_the_vae_in_it(vae: AutoencoderKL, expected: torch.Tensor, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    torch.testing.assert_close(encoded(tmp_path), expected, rtol=0, atol=0)
    record = load_codec(str(tmp_path)).record
    assert record.location == str(tmp_path / "vae") and codec_of(record).record == record
    shutil.rmtree(tmp_path / "vae")
    with pytest.raises(
        DataError, match=r"it is a pipeline without a folder vae \(it holds model_index\.json, unet\)\. Give a folder"
    ):
        load_codec(str(tmp_path))


def test_single_files_are_described(vae: AutoencoderKL, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path / "vae")
    state = load_file(tmp_path / "vae" / WEIGHTS)
    x = torch.zeros(1)
    cases = {
        "a.safetensors": (state, f"weights of diffusers without their {CONFIG}; put both into a folder"),
        "b.safetensors": ({"first_stage_model.encoder.conv_in.bias": x}, "a whole checkpoint of latent diffusion"),
        "c.safetensors": ({"encoder.down.0.block.0.norm1.bias": x}, r"a VAE of latent diffusion, .*from_single_file"),
        "d.safetensors": ({"model.layer": x}, r"1 tensors that are no known VAE, such as model\.layer"),
    }
    for name, (tensors, message) in cases.items():
        save_file(tensors, tmp_path / name)
        with pytest.raises(DataError, match=rf"the codec .*/{name} is a file: .*{message}"):
            load_codec(str(tmp_path / name))
    for name, message in (
        ("e.ckpt", "a codec is a folder. If it is a checkpoint"),
        ("f.safetensors", "no weight file"),
    ):
        (tmp_path / name).write_bytes(b"words")
        with pytest.raises(DataError, match=message):
            load_codec(str(tmp_path / name))


def test_other_folders_are_described(vae: AutoencoderKL, tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    with pytest.raises(DataError, match=r"it has no config\.json \(it holds snapshots\)"):
        load_codec(str(tmp_path))
    with pytest.raises(DataError, match=r"there is no codec .*owner/name: .*have to be downloaded first"):
        load_codec(str(tmp_path / "owner/name"))
    vae.save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=rf"no {WEIGHTS} and no {INDEX} \(it holds config\.json, model\.safetensors"):
        load_codec(str(tmp_path))
    (tmp_path / "model.safetensors").rename(tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(DataError, match=r"config\.json names no class of diffusers \(_class_name\)"):
        load_codec(str(tmp_path))
