"""Every supported VAE of diffusers, tiny and with random weights, compared with diffusers.

The expected normalizations are those of the pipelines of diffusers 0.42 before they decode:
SanaPipeline, FluxPipeline, CogVideoXPipeline, WanPipeline, LTXPipeline and HunyuanVideoPipeline.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rdm_scale.codecs import CONFIG, INDEX, codec_of, load_codec, normalize
from rdm_scale.codecs.record import CodecRecord
from rdm_scale.errors import DataError
from tests.support.rounding import assert_close_up_to_rounding, evaluate

MEAN, STD = [0.1, -0.2, 0.3, -0.4], [0.5, 1.0, 2.0, 4.0]


def channels(values: list[float]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


@dataclass(frozen=True)
class Case:
    """A tiny model, a clip that fits it, and the steps of its pipeline."""

    make: Callable[[], Any]
    pixels: tuple[int, int, int]  # T, H, W
    latents: tuple[int, int, int, int]
    unscale: Callable[[Tensor], Tensor]  # latents of the diffusion model to those that the VAE decodes
    frames: str  # of the message that refuses two frames more
    posterior: bool = True
    decode_options: dict[str, Tensor] | None = None


def tiny(**config: Any) -> Any:
    blocks: dict[str, Any] = {f"{side}_block_out_channels": (4, 4, 4) for side in ("encoder", "decoder")}
    numbers = {f"num_{side}_blocks": (1, 1, 1) for side in ("encoder", "decoder")}
    return diffusers.AutoencoderTiny(**blocks | numbers | config)


def dc() -> Any:
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        scaling_factor=0.41407,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
    )


def cogvideox() -> Any:
    return diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.7,
        invert_scale_latents=True,  # of conditioning pictures only
    )


def wan(**config: Any) -> Any:
    return diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=MEAN, latents_std=STD, **config
    )


def ltx(**config: Any) -> Any:
    options: dict[str, Any] = {
        "latent_channels": 4,
        "block_out_channels": (8, 8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8, 8),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1, 1),
        "scaling_factor": 0.8,
    }
    vae = diffusers.AutoencoderKLLTXVideo(**options | config)
    vae.latents_mean.copy_(torch.tensor(MEAN))
    vae.latents_std.copy_(torch.tensor(STD))
    return vae


def ltx_with_timestep() -> Any:
    """LTX-Video 0.9.1: its decoder takes a timestep and injects noise."""
    vae = ltx(timestep_conditioning=True, decoder_inject_noise=(True, True, True, True, False))
    for name, parameter in vae.named_parameters():
        if "per_channel_scale" in name:
            parameter.data.fill_(0.5)  # new models inject nothing
    return vae


def hunyuan() -> Any:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    )


ANY = "none"  # any number of frames will do
CASES = {
    "AutoencoderTiny": Case(tiny, (2, 8, 12), (4, 2, 2, 3), lambda z: z, ANY, posterior=False),
    "AutoencoderTiny with a shift": Case(
        lambda: tiny(scaling_factor=0.5, shift_factor=0.25),
        (2, 8, 12),
        (4, 2, 2, 3),
        lambda z: z / 0.5 + 0.25,
        ANY,
        posterior=False,
    ),
    "AutoencoderDC": Case(dc, (2, 4, 6), (4, 2, 2, 3), lambda z: z / 0.41407, ANY, posterior=False),
    "AutoencoderKLCogVideoX": Case(
        cogvideox, (9, 16, 24), (4, 3, 2, 3), lambda z: 1 / 0.7 * z, r"takes 1 \+ 8 k frames; choose 9 or 17"
    ),
    "AutoencoderKLWan": Case(
        wan, (5, 16, 24), (4, 2, 2, 3), lambda z: z * channels(STD) + channels(MEAN), r"1 \+ 4 k frames; choose 5 or 9"
    ),
    "AutoencoderKLWan of Wan 2.2": Case(
        lambda: wan(is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16),
        (5, 32, 16),
        (4, 2, 2, 1),
        lambda z: z * channels(STD) + channels(MEAN),
        r"1 \+ 4 k frames; choose 5 or 9",
    ),
    "AutoencoderKLLTXVideo": Case(
        ltx,
        (9, 32, 64),
        (4, 2, 1, 2),
        lambda z: z * channels(STD) / 0.8 + channels(MEAN),
        r"1 \+ 8 k frames; choose 9 or 17",
    ),
    "AutoencoderKLLTXVideo with a timestep": Case(
        ltx_with_timestep,
        (9, 32, 64),
        (4, 2, 1, 2),
        lambda z: z * channels(STD) / 0.8 + channels(MEAN),
        r"1 \+ 8 k frames; choose 9 or 17",
        decode_options={"temb": torch.zeros(2)},  # the pipeline's default decode_timestep
    ),
    "AutoencoderKLHunyuanVideo": Case(
        hunyuan, (5, 16, 24), (4, 2, 2, 3), lambda z: z / 0.476986, r"1 \+ 4 k frames; choose 5 or 9"
    ),
}


@pytest.fixture(scope="module", params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path, Any]:
    case = CASES[request.param]
    torch.manual_seed(0)
    vae = case.make().eval()
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return case, folder, vae


def clips(case: Case) -> Tensor:
    return torch.rand(2, 3, *case.pixels, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def moments_by_diffusers(case: Case, vae: Any, pixels: Tensor) -> Tensor:
    if case.posterior:
        posterior = vae.encode(pixels).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)
    frames = [vae.encode(pixels[:, :, i], return_dict=False)[0] for i in range(pixels.shape[2])]
    latents = torch.stack(frames, dim=2)
    return torch.cat([latents, torch.full_like(latents, -30.0)], dim=1)


@torch.no_grad()
def pixels_by_diffusers(case: Case, vae: Any, raw: Tensor) -> Tensor:
    if case.posterior:
        torch.manual_seed(0)  # for the decoder that injects noise
        options = {name: value.to(raw) for name, value in (case.decode_options or {}).items()}
        pixels: Tensor = vae.decode(raw, **options).sample
        return pixels.clamp(-1, 1)
    return torch.stack([vae.decode(raw[:, :, i]).sample for i in range(raw.shape[2])], dim=2).clamp(-1, 1)


def unscaled_by_diffusers(case: Case, vae: Any, latents: Tensor) -> Tensor:
    """Pixels of normalized latents."""
    return pixels_by_diffusers(case, vae, case.unscale(latents))


def test_it_does_what_diffusers_does(saved: tuple[Case, Path, Any]) -> None:
    case, folder, vae = saved
    codec, pixels = load_codec(str(folder)), clips(case)
    assert codec.record.name == type(vae).__name__ and codec.has_posterior == case.posterior
    assert codec.latent_shape(*case.pixels) == case.latents and codec.channels == case.latents[0]
    moments = codec.encode(pixels)
    assert moments.shape == (2, 2 * case.latents[0], *case.latents[1:]) and not moments.requires_grad
    assert_close_up_to_rounding(moments, evaluate(vae, partial(moments_by_diffusers, case), pixels))

    raw = moments[:, : codec.channels]
    latents = normalize(raw, codec.record)
    torch.testing.assert_close(case.unscale(latents), raw)
    restored = codec.decode(latents)
    assert restored.shape == pixels.shape
    assert_close_up_to_rounding(restored, evaluate(vae, partial(unscaled_by_diffusers, case), latents))
    assert torch.equal(codec.decode(latents), restored)
    assert codec.decode(1000 * latents).abs().max() <= 1


def test_bound_of_rounding_is_not_blind(saved: tuple[Case, Path, Any]) -> None:
    """A crop that is one pixel off, a tile that is missing and a wrong normalization are no rounding errors."""
    case, folder, vae = saved
    codec, pixels = load_codec(str(folder)), clips(case)
    moments = evaluate(vae, partial(moments_by_diffusers, case), pixels)
    tile = pixels.clone()
    tile[..., -2:, -2:] = 0
    for wrong in (pixels.roll(1, -1), pixels.flip(2), tile):
        with pytest.raises(AssertionError, match="differ by more than rounding"):
            assert_close_up_to_rounding(codec.encode(wrong), moments)

    latents = normalize(moments.rounded[:, : codec.channels], codec.record)
    restored = evaluate(vae, partial(unscaled_by_diffusers, case), latents)
    shift, scale = codec.record.shift, codec.record.scale
    wrong_records = [{"scale": [1 / s for s in scale]}, {"shift": [s + 0.01 for s in shift]}]
    for change in wrong_records if any(s != 1 for s in scale) else wrong_records[1:]:
        record = CodecRecord.model_validate(codec.record.model_dump() | change)
        with pytest.raises(AssertionError, match="differ by more than rounding"):
            assert_close_up_to_rounding(codec_of(record).decode(latents), restored)


def test_one_frame_is_an_image(saved: tuple[Case, Path, Any]) -> None:
    case, folder, _ = saved
    codec, image = load_codec(str(folder)), clips(case)[:, :, :1]
    channels, _, *size = case.latents
    assert codec.latent_shape(1, *case.pixels[1:]) == (channels, 1, *size)
    assert codec.decode(codec.encode(image)[:, :channels]).shape == image.shape


def test_what_does_not_fit(saved: tuple[Case, Path, Any]) -> None:
    case, folder, _ = saved
    codec, (frames, height, width) = load_codec(str(folder)), case.pixels
    with pytest.raises(DataError, match=f"images of {height} x {width + 1} pixels do not fit"):
        codec.latent_shape(frames, height, width + 1)
    if case.frames == ANY:
        assert codec.latent_shape(frames + 2, height, width)[1] == frames + 2
    else:
        with pytest.raises(DataError, match=case.frames):
            codec.latent_shape(frames + 2, height, width)
        with pytest.raises(DataError, match=r"clips of 2 frames do not fit"):
            codec.encode(clips(case)[:, :, :2])
    with pytest.raises(DataError, match="clips of 0 frames"):
        codec.latent_shape(0, height, width)


def test_a_codec_that_moved(saved: tuple[Case, Path, Any], tmp_path: Path) -> None:
    case, folder, vae = saved
    codec = load_codec(str(folder))
    moved = shutil.copytree(folder, tmp_path / "moved")
    again = codec_of(codec.record, location=str(moved))
    assert again.record == codec.record
    expected = evaluate(vae, partial(moments_by_diffusers, case), clips(case))
    assert_close_up_to_rounding(again.encode(clips(case)), expected)
    weights = moved / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    name = next(name for name in state if name.endswith("bias"))
    save_file(state | {name: state[name] + 1e-3}, weights)
    with pytest.raises(DataError, match="not those that the data was encoded with"):
        codec_of(codec.record, location=str(moved))


@torch.no_grad()
def test_cogvideox_decodes_an_even_number_of_latent_frames_to_too_many() -> None:
    """The reason why its codec takes 1 + 8 k frames: 5 frames become 2 latent frames, and those decode to 8."""
    torch.manual_seed(0)
    vae = cogvideox().eval()
    latents = vae.encode(torch.zeros(1, 3, 5, 16, 16)).latent_dist.mean
    assert latents.shape[2] == 2 and vae.decode(latents).sample.shape[2] == 8


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    hunyuan().save_pretrained(tmp_path / "vae", max_shard_size="20KB")
    assert len(list((tmp_path / "vae").glob("*.safetensors"))) > 2
    return tmp_path / "vae"


IMAGE = torch.linspace(-1, 1, 3 * 256).view(1, 3, 1, 16, 16)


def test_weights_in_several_files(sharded: Path) -> None:
    torch.manual_seed(0)
    vae = hunyuan().eval()
    expected = evaluate(vae, partial(moments_by_diffusers, CASES["AutoencoderKLHunyuanVideo"]), IMAGE)
    codec = load_codec(str(sharded))
    assert_close_up_to_rounding(codec.encode(IMAGE), expected)
    assert_close_up_to_rounding(codec_of(codec.record).encode(IMAGE), expected)
    name = sorted(path.name for path in sharded.glob("*.safetensors"))[1]
    state = load_file(sharded / name)
    save_file({key: tensor + 1 for key, tensor in state.items()}, sharded / name)
    with pytest.raises(DataError, match="not those that the data was encoded with"):
        codec_of(codec.record)


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def twice(folder: Path) -> None:
    one, two = sorted(folder.glob("*.safetensors"))[:2]
    save_file(load_file(one) | load_file(two), two)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), "lacks diffusion_pytorch_model-00002-of"),
        (
            lambda f: rewrite(f / INDEX, weight_map={"a": "../elsewhere.safetensors"}),
            "names the file '../elsewhere.safetensors'",
        ),
        (lambda f: rewrite(f / INDEX, weight_map={"a": "weights.bin"}), "names the file 'weights.bin'"),
        (lambda f: rewrite(f / INDEX, weight_map=[]), "has no weight_map"),
        (lambda f: (f / INDEX).write_text("{"), f"{INDEX} is not JSON"),
        (lambda f: (f / INDEX).write_text(" " * 2**25), "too large"),
        (twice, "two files contain"),
        (lambda f: rewrite(f / CONFIG, in_channels=1), "cannot build a VAE"),
        (lambda f: rewrite(f / CONFIG, layers_per_block=10**9), "larger model than the .* tensors of its weights"),
        (lambda f: rewrite(f / CONFIG, block_out_channels=[4] * 10**5), "larger model than the"),
        (lambda f: rewrite(f / CONFIG, spatial_compression_ratio=0), "cannot build a VAE"),
        (lambda f: rewrite(f / CONFIG, scaling_factor=None), "impossible normalization"),
    ],
)
def test_damaged_folders(sharded: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(sharded)
    with pytest.raises(DataError, match=message):
        load_codec(str(sharded))


def test_a_model_of_other_pixels(tmp_path: Path) -> None:
    tiny(in_channels=4, out_channels=4).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"it does not encode RGB pixels: \{'in_channels': 4"):
        load_codec(str(tmp_path))


def test_a_configuration_of_another_compression(tmp_path: Path) -> None:
    """Refused when encoding, not stored as latents of an unexpected shape."""
    ltx().save_pretrained(tmp_path)
    rewrite(tmp_path / CONFIG, spatial_compression_ratio=16)
    with pytest.raises(DataError, match=r"makes latents of shape \[8, 1, 1, 1\], expected \[8, 1, 2, 2\]"):
        load_codec(str(tmp_path)).encode(torch.zeros(1, 3, 1, 32, 32))
