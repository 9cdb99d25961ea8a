"""The model against published counts, and against diffusers' independent implementation of DiT."""

import pytest
import torch
from diffusers import DiTTransformer2DModel

from rdm_scale.config import InputConfig, ModelConfig, load_config
from rdm_scale.models import DiffusionTransformer, build_model
from rdm_scale.models.embeddings import patchify, unpatchify
from tests.support.randomized_models import randomized

# Millions as in table 1 of the DiT paper; XL/2's exact count is the one that its training code logs.
PUBLISHED = {"s": (384, 12, 33), "b": (768, 12, 130), "l": (1024, 24, 458), "xl": (1152, 28, 675)}


def dit_count(width: int, depth: int) -> int:
    """Parameters of DiT-x/2 for 32x32x4 latents, added up by hand from the layers that the paper names."""
    block = 4 * width**2 + 4 * width + 8 * width**2 + 5 * width + 6 * width**2 + 6 * width
    embedders = 17 * width + (256 * width + width + width**2 + width) + 1001 * width + 256 * width
    final = 2 * width**2 + 2 * width + 32 * width + 32
    return depth * block + embedders + final


def small(**changes: object) -> ModelConfig:
    base = {"input": InputConfig(height=8, width=8), "hidden_size": 64, "num_heads": 4, "depth": 3, "num_classes": 10}
    return ModelConfig(**{**base, **changes})


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("size", PUBLISHED)
def test_dit_has_the_published_parameter_count(size: str) -> None:
    with torch.device("meta"):
        model = build_model(load_config(f"configs/dit_{size}.yaml").model)
    width, depth, millions = PUBLISHED[size]
    count = parameters(model) + model.pos_spatial.numel()
    assert count == dit_count(width, depth)
    assert abs(count / 1e6 - millions) < 1  # the table cuts off some (B: 130.51) and rounds others
    assert size != "xl" or count == 675_129_632


# Millions as in table 1 of the Latte paper (cut off); unlike DiT's they leave out the fixed position tables.
LATTE = {"s": (384, 12, 32.48), "b": (768, 12, 129.54), "l": (1024, 24, 456.81), "xl": (1152, 28, 673.68)}


@pytest.mark.parametrize("size", LATTE)
def test_latte_has_the_published_parameter_count(size: str) -> None:
    """Blocks are as in DiT, spatial and temporal ones counted together; there are no classes."""
    config = load_config(f"configs/latte_{size}.yaml").model
    with torch.device("meta"):
        model = build_model(config)
    width, depth, millions = LATTE[size]
    assert (config.input.frames, model.pos_temporal.shape) == (16, (16, width))
    assert parameters(model) == dit_count(width, depth) - (1001 + 256) * width
    assert int(parameters(model) / 1e4) / 100 == millions


def as_diffusers_dit(model: DiffusionTransformer) -> DiTTransformer2DModel:
    """The same weights in diffusers' DiT, which holds one copy of the embedders per block and splits q, k, v."""
    config, heads = model.config, model.config.num_heads
    dit = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=config.hidden_size // heads,
        in_channels=config.input.channels,
        out_channels=config.input.channels,
        num_layers=config.depth,
        sample_size=config.input.height,
        patch_size=config.patch_size[1],
        num_embeds_ada_norm=config.num_classes,
    )
    ours, theirs = model.state_dict(), {}
    theirs["pos_embed.proj.weight"] = ours["patch_embed.weight"].view(config.hidden_size, -1, 2, 2)
    theirs["pos_embed.proj.bias"] = ours["patch_embed.bias"]
    for i in range(config.depth):
        here, there = f"blocks.{i}.", f"transformer_blocks.{i}."
        for kind in ("weight", "bias"):
            embedder = there + "norm1.emb."
            theirs[f"{embedder}timestep_embedder.linear_1.{kind}"] = ours[f"timestep_embed.hidden.{kind}"]
            theirs[f"{embedder}timestep_embedder.linear_2.{kind}"] = ours[f"timestep_embed.out.{kind}"]
            theirs[f"{there}norm1.linear.{kind}"] = ours[f"{here}modulation.{kind}"]
            qkv = ours[f"{here}attention.branch.qkv.{kind}"]
            split = qkv.view(heads, 3, config.hidden_size // heads, -1).transpose(0, 1).reshape(3, *qkv[::3].shape)
            for name, value in zip(("to_q", "to_k", "to_v"), split, strict=True):
                theirs[f"{there}attn1.{name}.{kind}"] = value
            theirs[f"{there}attn1.to_out.0.{kind}"] = ours[f"{here}attention.branch.out.{kind}"]
            theirs[f"{there}ff.net.0.proj.{kind}"] = ours[f"{here}mlp.branch.up.{kind}"]
            theirs[f"{there}ff.net.2.{kind}"] = ours[f"{here}mlp.branch.down.{kind}"]
        theirs[f"{there}norm1.emb.class_embedder.embedding_table.weight"] = ours["class_embed.weight"]
    for kind in ("weight", "bias"):
        theirs[f"proj_out_1.{kind}"] = ours[f"head.modulation.{kind}"]
        theirs[f"proj_out_2.{kind}"] = ours[f"head.out.{kind}"]
    missing, unexpected = dit.load_state_dict(theirs, strict=False)
    assert not unexpected
    assert [name for name in missing if "pos_embed.pos_embed" not in name] == []
    return dit.eval()


def test_adaln_zero_computes_what_diffusers_dit_computes() -> None:
    model = randomized(small(residual="adaln_zero", timestep_spacing="diffusers"), scale=0.05)
    latents, timesteps = torch.randn(5, 4, 1, 8, 8), torch.tensor([0, 1, 10, 500, 999])
    labels = torch.tensor([0, 3, 9, 10, 5])
    with torch.no_grad():
        ours = model(latents, timesteps, labels)
        theirs = as_diffusers_dit(model)(latents[:, :, 0], timesteps, labels).sample
    torch.testing.assert_close(ours[:, :, 0], theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_timestep_spacings_differ() -> None:
    latents, timesteps, labels = torch.randn(2, 4, 1, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([0, 1])
    dit, diffusers = (randomized(small(timestep_spacing=s), scale=0.05) for s in ("dit", "diffusers"))
    assert (dit(latents, timesteps, labels) - diffusers(latents, timesteps, labels)).abs().max() > 1e-3


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 1, 4), (2, 4, 2)])
def test_unpatchify_inverts_patchify_up_to_the_order_within_a_token(patch: tuple[int, int, int]) -> None:
    x = torch.arange(2 * 3 * 4 * 8 * 8, dtype=torch.float32).view(2, 3, 4, 8, 8)
    tokens = patchify(x, patch)
    channel_last = tokens.unflatten(2, (3, -1)).transpose(2, 3).flatten(2)
    assert torch.equal(unpatchify(channel_last, patch, (4, 8, 8)), x)
    first = x[0, :, : patch[0], : patch[1], : patch[2]].reshape(-1)
    assert torch.equal(tokens[0, 0], first)


def test_position_tables() -> None:
    image = build_model(small(input=InputConfig(height=8, width=4)))
    assert dict(image.named_buffers())["pos_spatial"].shape == (8, 64)
    assert "pos_temporal" not in dict(image.named_buffers())
    video = build_model(small(input=InputConfig(frames=6, height=8, width=8), patch_size=(2, 2, 2)))
    assert video.pos_temporal.shape == (3, 64)
    assert video(torch.randn(2, 4, 6, 8, 8), torch.rand(2), torch.tensor([1, 2])).shape == (2, 4, 6, 8, 8)
    assert torch.equal(video.position_embedding((3, 4, 4))[17], video.pos_temporal[1] + video.pos_spatial[1])
    # closed form: second row (of 4 wide: index 2 columns), first frequency is 1: sin(row) sits at D/2
    assert image.pos_spatial[2, 32].item() == pytest.approx(0.8414709848)
    assert image.pos_spatial[1, 0].item() == pytest.approx(0.8414709848)


def test_other_sizes_than_the_configured_one() -> None:
    """Predictions equal those of a model configured for that size with the same weights; an image passes a video model
    as its first frame.
    """
    wide = build_model(small(input=InputConfig(height=4, width=16)))
    square = build_model(small(input=InputConfig(height=8, width=8)))
    video = build_model(small(input=InputConfig(frames=3, height=8, width=8)))
    shorter = build_model(small(input=InputConfig(frames=2, height=8, width=8)))
    for model, other, size in ((square, wide, (1, 4, 16)), (video, shorter, (2, 8, 8))):
        latents = torch.randn(2, 4, *size)
        given = latents, torch.rand(2) * 1000, torch.tensor([1, 2])
        assert torch.equal(model(*given), other(*given))
    image = torch.randn(2, 4, 1, 8, 8)
    assert video(image, torch.rand(2), torch.tensor([1, 2])).shape == image.shape
    assert torch.equal(video.position_embedding((1, 4, 4)), video.pos_temporal[0] + video.pos_spatial)


def test_every_parameter_of_every_residual_structure_has_a_gradient() -> None:
    for kind in ("plain", "rezero", "layerscale", "adaln_zero", "neural_rdm"):
        model = randomized(small(residual=kind), scale=0.05)
        loss = model(torch.randn(2, 4, 1, 8, 8), torch.rand(2) * 1000, torch.tensor([1, 10])).square().mean()
        loss.backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_learned_variance_doubles_the_channels_and_none_has_no_classes() -> None:
    model = build_model(small(learned_variance=True, condition="none"))
    assert model.class_embed is None
    assert model(torch.randn(2, 4, 1, 8, 8), torch.rand(2)).shape == (2, 8, 1, 8, 8)


def test_residual_stream_stays_fp32_under_bf16() -> None:
    model = randomized(small(depth=2), scale=0.05).to(torch.bfloat16)
    latents, labels = torch.randn(2, 4, 1, 8, 8), torch.tensor([1, 2])
    z, conditioning = model.embed(latents, torch.tensor([1.0, 900.0]), labels)
    seen = []
    for block in model.blocks.values():
        block.mlp.branch.register_forward_hook(lambda m, args, out: seen.append((args[0].dtype, out.dtype)))
        z = block(z, conditioning)
        assert z.dtype == torch.float32
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert model.unembed(z, conditioning, (1, 8, 8)).dtype == torch.float32
