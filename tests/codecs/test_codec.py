"""Codecs compared with diffusers, and every kind of damage to the folder of a codec."""

import hashlib
import json
import math
import shutil

import fsspec
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from rdm_scale.codecs import CONFIG, WEIGHTS, codec_of, denormalize, load_codec, normalize
from rdm_scale.codecs.record import CodecRecord
from rdm_scale.errors import DataError
from tests.support.rounding import assert_close_up_to_rounding, evaluate


def make_vae(folder, **config: object) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        latent_channels=2,
        norm_num_groups=2,
        **config,
    )
    vae.save_pretrained(folder, safe_serialization=True)
    return vae.eval()


@pytest.fixture(scope="module")
def scalar_vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    return folder, make_vae(folder, scaling_factor=0.5, shift_factor=0.25)


@pytest.fixture
def folder(scalar_vae, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(scalar_vae[0], tmp_path / "vae")


def images(n: int = 3, size: int = 16) -> torch.Tensor:
    """[N, 3, 1, size, size]."""
    return torch.rand(n, 3, 1, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def encode_image(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Mean and log-variance [N, 2C, 1, H', W'] of images [N, 3, 1, H, W]."""
    posterior = vae.encode(pixels[:, :, 0]).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], dim=1).unsqueeze(2)


def decode_image(vae: AutoencoderKL, raw: torch.Tensor) -> torch.Tensor:
    """Pixels [N, 3, 1, H, W] of raw latents [N, C, 1, H', W']."""
    return vae.decode(raw[:, :, 0]).sample.clamp(-1, 1).unsqueeze(2)


@torch.no_grad()
def test_a_folder_does_what_diffusers_does(scalar_vae):
    folder, vae = scalar_vae
    codec, x = load_codec(str(folder)), images()
    assert codec.latent_shape(1, 16, 24) == (2, 1, 8, 12) and codec.has_posterior
    expected = evaluate(vae, encode_image, x)
    moments = codec.encode(x)
    assert moments.shape == (3, 4, 1, 8, 8) and not moments.requires_grad
    assert_close_up_to_rounding(moments, expected)
    # as the pipelines of diffusers for a scalar shift and scale (Stable Diffusion 3, FLUX)
    latents = (moments[:, :2] - 0.25) * 0.5
    torch.testing.assert_close(normalize(moments[:, :2], codec.record), latents)
    restored = evaluate(vae, lambda vae, z: decode_image(vae, z / 0.5 + 0.25), latents)
    assert_close_up_to_rounding(codec.decode(latents), restored)
    assert codec.decode(1000 * latents).abs().max() <= 1


def test_the_frames_of_a_clip_are_images(scalar_vae):
    folder, vae = scalar_vae
    codec, x = load_codec(str(folder)), images()
    clip = x.transpose(0, 2)  # one clip of three frames
    assert codec.latent_shape(3, 16, 16) == (2, 3, 8, 8)
    moments = codec.encode(clip)
    assert_close_up_to_rounding(moments.transpose(0, 2), evaluate(vae, encode_image, x))
    latents = moments[:, :2].transpose(0, 2)
    expected = evaluate(vae, lambda vae, z: decode_image(vae, z / 0.5 + 0.25), latents)
    assert_close_up_to_rounding(codec.decode(latents.transpose(0, 2)).transpose(0, 2), expected)


@torch.no_grad()
def test_normalization_by_channel(tmp_path):
    vae = make_vae(tmp_path, scaling_factor=0.5, latents_mean=[1.0, -2.0], latents_std=[4.0, 0.5])
    codec, x = load_codec(str(tmp_path)), images()
    raw = codec.encode(x)[:, :2]
    # StableDiffusionXLPipeline: (raw - latents_mean) * scaling_factor / latents_std
    mean, std = torch.tensor([1.0, -2.0]).view(2, 1, 1, 1), torch.tensor([4.0, 0.5]).view(2, 1, 1, 1)
    latents = (raw - mean) * 0.5 / std
    torch.testing.assert_close(normalize(raw, codec.record), latents)
    torch.testing.assert_close(denormalize(latents, codec.record), raw)
    mean, std = mean.double(), std.double()
    expected = evaluate(vae, lambda vae, z: decode_image(vae, (z * (std / 0.5) + mean).to(z.dtype)), latents)
    assert_close_up_to_rounding(codec.decode(latents), expected)


def test_the_record_identifies_the_weights(scalar_vae):
    folder, vae = scalar_vae
    record = load_codec(str(folder)).record
    assert record == CodecRecord(
        name="AutoencoderKL",
        location=str(folder),
        digest=hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
        shift=(0.25,),
        scale=(0.5,),
    )
    again = codec_of(record)
    assert again.record == record
    assert_close_up_to_rounding(again.encode(images()), evaluate(vae, encode_image, images()))


def test_attention_weights_with_the_names_of_old_files(tmp_path):
    """Published VAEs of Stable Diffusion 1 and 2 still carry them."""
    vae = make_vae(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(tmp_path / WEIGHTS)
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in state.items()}
    assert any("attentions.0.query.weight" in key for key in state)
    save_file(state, tmp_path / WEIGHTS)
    assert_close_up_to_rounding(load_codec(str(tmp_path)).encode(images()), evaluate(vae, encode_image, images()))


def test_half_precision_weights_are_computed_in_float32(folder):
    vae = AutoencoderKL.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False).half()
    vae.save_pretrained(folder, safe_serialization=True)
    expected = evaluate(vae.float(), encode_image, images())
    assert_close_up_to_rounding(load_codec(str(folder)).encode(images()), expected)


def test_a_folder_on_another_file_system(scalar_vae):
    folder, vae = scalar_vae
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/codec_test/{name}": (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)})
    codec = load_codec("memory://codec_test")
    assert codec.record.location == "memory:///codec_test"
    assert_close_up_to_rounding(codec_of(codec.record).encode(images()), evaluate(vae, encode_image, images()))


def test_identity_is_exact():
    codec, x = load_codec("identity"), images(size=15).reshape(1, 3, 3, 15, 15)
    assert codec.latent_shape(3, 15, 15) == (3, 3, 15, 15) and not codec.has_posterior
    moments = codec.encode(x)
    torch.testing.assert_close(moments[:, :3], x, rtol=0, atol=0)
    assert (0.5 * moments[:, 3:]).exp().max() < 1e-6  # the standard deviation of the posterior
    torch.testing.assert_close(codec.decode(moments[:, :3]), x, rtol=0, atol=0)
    assert codec_of(codec.record).record == CodecRecord(name="identity", location="identity")


def test_what_does_not_fit(scalar_vae):
    codec = load_codec(str(scalar_vae[0]))
    with pytest.raises(DataError, match=r"16 x 17 pixels do not fit .* multiples of 2"):
        codec.latent_shape(1, 16, 17)
    with pytest.raises(DataError, match="multiples of 2"):
        codec.encode(images(size=15))
    with pytest.raises(DataError, match=r"pixels \[B, 3, T, H, W\], not \[3, 1, 1, 16, 16\]"):
        codec.encode(images()[:, :1])
    with pytest.raises(DataError, match=r"latents \[B, 2, T, H, W\], not \[1, 4, 1, 8, 8\]"):
        codec.decode(torch.zeros(1, 4, 1, 8, 8))


def test_other_weights_than_the_data_was_encoded_with(folder, tmp_path):
    record = load_codec(str(folder)).record
    moved = shutil.copytree(folder, tmp_path / "moved")
    state = load_file(folder / WEIGHTS)
    state["decoder.conv_out.bias"] += 1e-3
    save_file(state, folder / WEIGHTS)
    with pytest.raises(DataError, match=f"not those that the data was encoded with .*{record.digest}"):
        codec_of(record)
    assert codec_of(record, location=str(moved)).record == record  # the same weights, elsewhere
    with pytest.raises(DataError, match="encoded with"):
        codec_of(record, location="identity")


def test_the_normalization_of_the_data_is_kept(folder):
    record = load_codec(str(folder)).record
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"scaling_factor": 3.0}))
    assert codec_of(record).record.scale == (0.5,)


def rewrite_config(folder, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def only_pickled(folder) -> None:
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "there is no codec .*/vae"),
        (lambda f: (f / CONFIG).unlink(), "there is no codec .*/vae"),
        (lambda f: (f / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
        (only_pickled, "pickled weights are not loaded because they can run code"),
        (lambda f: (f / CONFIG).write_text("{"), f"{CONFIG} is not JSON"),
        (lambda f: (f / CONFIG).write_text("[]"), f"{CONFIG} is not a JSON object"),
        (lambda f: (f / CONFIG).write_text(" " * 2**21), "too large"),
        (lambda f: rewrite_config(f, _class_name="VQModel"), "holds a VQModel"),
        (lambda f: rewrite_config(f, block_out_channels=[4, 8, 8]), "cannot build a VAE"),
        (lambda f: rewrite_config(f, block_out_channels=[2**20, 2**20]), "cannot build a VAE"),
        (lambda f: rewrite_config(f, latent_channels="many"), "cannot build a VAE"),
        (lambda f: rewrite_config(f, scaling_factor=0.0), "impossible normalization"),
        (lambda f: rewrite_config(f, scaling_factor="x"), "impossible normalization"),
        (lambda f: rewrite_config(f, latents_mean=[0, 0], latents_std=[0, 1]), "impossible normalization"),
        (lambda f: rewrite_config(f, latents_mean=[0, 0, 0], latents_std=[1, 1, 1]), "impossible normalization"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), "cannot build a VAE"),
        (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 64), "cannot build a VAE"),
    ],
)
def test_damaged_folders(folder, damage, message):
    damage(folder)
    with pytest.raises(DataError, match=message):
        load_codec(str(folder))


@pytest.fixture(scope="module")
def scans():
    """Images [N, 3, 1, 32, 32] of all digit scans, and their labels."""
    data, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(data).reshape(-1, 8, 8)
    large = [
        torch.tensor(
            list(Image.fromarray((s * (255 / 16)).round().byte().numpy()).resize((32, 32), 3).tobytes())
        ).reshape(32, 32)
        for s in small
    ]
    pixels = torch.stack(large).float() / 127.5 - 1
    return pixels[:, None, None].expand(-1, 3, -1, -1, -1), labels


def test_the_packaged_vae_restores_digits(scans):
    x, labels = scans
    codec = load_codec("digits")
    assert codec.latent_shape(1, 32, 32) == (4, 1, 8, 8)
    assert codec.record.name == codec.record.location == "digits"
    shown = x[::9]
    latents = normalize(codec.encode(shown)[:, :4], codec.record)
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(4), rtol=0, atol=0.1)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(4), rtol=0, atol=0.1)
    restored = codec.decode(latents)
    psnr = 10 * math.log10(4 / (restored - shown).square().mean())  # peak to peak is 2
    assert psnr > 34
    others = [i for i in range(len(x)) if i % 9]
    judge = KNeighborsClassifier(1).fit(x[others, 0].flatten(1), labels[others])
    assert judge.score(restored[:, 0].flatten(1), labels[::9]) > 0.97
    noisy = codec.decode(latents + 0.2 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)))
    assert judge.score(noisy[:, 0].flatten(1), labels[::9]) > 0.97
