"""The options of a block, each against the plain formula."""

import pytest
import torch
from torch import Tensor

from rdm_scale.config import InputConfig, ModelConfig
from rdm_scale.models import DiffusionTransformer, build_model
from rdm_scale.models.blocks import SideInputs

GRID, B = (3, 2, 4), 2


def clips(**changes: object) -> ModelConfig:
    """A model of clips of 3 x 2 x 4 tokens, and heads of 8 channels."""
    size = InputConfig(channels=2, frames=3, height=4, width=8)
    base = {"input": size, "hidden_size": 32, "num_heads": 4, "depth": 2, "condition": "none"}
    return ModelConfig(**{**base, **changes})


def randomised(config: ModelConfig) -> DiffusionTransformer:
    """A model none of whose parameters is zero, so that every path shows in the output."""
    model = build_model(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def stream(seed: int = 0) -> Tensor:
    return torch.randn(24, B, 32, generator=torch.Generator().manual_seed(seed))


def split_heads(qkv_SBW: Tensor) -> tuple[Tensor, ...]:
    """q, k, v [B, head, S, channel] of rows in the order (head, q/k/v, channel)."""
    return tuple(qkv_SBW.view(24, B, 4, 3, 8).permute(3, 1, 2, 0, 4))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """softmax(q k / sqrt(d)) v as [S, B, D], over the pairs [S, S] that are allowed."""
    weights = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~allowed, -torch.inf).softmax(-1)
    return (weights @ v).permute(2, 0, 1, 3).flatten(2)


FRAME = torch.arange(24) // 8
PLACE = torch.arange(24) % 8


@pytest.mark.parametrize(
    ("kind", "block", "of"), [("joint", 1, torch.zeros(24)), ("factorized", 0, FRAME), ("factorized", 1, PLACE)]
)
def test_tokens_attend_to_those_of_their_frame_or_place(kind: str, block: int, of: Tensor) -> None:
    """Factorized attention is attention with a mask: the spatial block's by frames, the temporal one's by places."""
    branch = randomised(clips(attention=kind)).blocks[str(block)].attention.branch
    x = stream()
    heads = plain_attention(*split_heads(branch.qkv(x)), of[:, None] == of[None])
    found = branch(x, SideInputs(torch.zeros(B, 32), GRID))
    torch.testing.assert_close(found, heads @ branch.out.weight.T)


def test_latte_adds_the_frames_positions_after_the_first_spatial_block() -> None:
    model = randomised(clips(attention="factorized"))
    seen = {}
    for i, block in model.blocks.items():
        block.register_forward_hook(lambda module, given, out, i=i: seen.update({i: (given[0], out)}))
    latents = torch.randn(B, 2, 3, 4, 8)
    model(latents, torch.rand(B))
    came, went = seen["1"][0], seen["0"][1]
    torch.testing.assert_close((came - went)[:, 0], model.pos_temporal[FRAME])
    z, _ = model.embed(latents, torch.rand(B), None)
    bare = z - model.pos_spatial.repeat(3, 1)[:, None]
    torch.testing.assert_close(bare[3, 1], model.patch_embed(latents[1, :, 0, :2, 6:8].reshape(-1)))


def test_frames_of_a_still_image_are_few() -> None:
    """T = 1 goes through factorized blocks: along time a token then sees itself only."""
    model = randomised(clips(attention="factorized"))
    image = torch.randn(B, 2, 1, 4, 8)
    assert model(image, torch.rand(B)).shape == image.shape
    x = stream()[:8]
    branch = model.blocks["1"].attention.branch
    v = branch.qkv(x).view(8, B, 4, 3, 8)[:, :, :, 2].flatten(2)
    torch.testing.assert_close(branch(x, SideInputs(torch.zeros(B, 32), (1, 2, 4))), v @ branch.out.weight.T)


def test_long_skips_join_each_block_to_its_mirror() -> None:
    """Against the formula: z + alpha W [modulated norm(z); norm(skip)] + beta, then what a block without skip does."""
    model = randomised(clips(stacking="u", depth=5))
    assert [block.skip is not None for block in model.blocks.values()] == [False, False, False, True, True]
    z, side = stream(), SideInputs(torch.randn(B, 32), GRID)
    outs = []
    for i, block in model.blocks.items():
        if block.skip is not None:
            shift, scale, g = block.modulation(torch.nn.functional.silu(side.condition)).split(32, -1)[:3]
            m, gate, layer = 12**-0.5, block.skip.gate, block.skip.branch.join  # 10 units and 2 skips
            joined = torch.cat([layer_norm(z) * (1 + scale) + shift, layer_norm(outs[4 - int(i)])], -1)
            z = z + (m * gate.a + g) * (joined @ layer.weight.T + layer.bias) + m * gate.b
            vectors = block.modulation(torch.nn.functional.silu(side.condition)).split(32, -1)[3:]
            for unit, given in ((block.attention, vectors[:3]), (block.mlp, vectors[3:])):
                z = unit(z, side, unit.vectors(given, z.dtype))
        else:
            z = block(z, side)
        outs.append(z)
    torch.testing.assert_close(model.run_blocks(range(5), stream(), side), z)


def layer_norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
