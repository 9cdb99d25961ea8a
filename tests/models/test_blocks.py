"""Options of a block, each compared with the plain formula."""

import math

import pytest
import torch
from torch import Tensor

from rdm_scale.conditions import TextCondition
from rdm_scale.config import InputConfig, ModelConfig, TextConfig
from rdm_scale.models import DiffusionTransformer, build_model
from rdm_scale.models.blocks import Conditioning
from rdm_scale.models.embeddings import apply_rope, axial_rope
from tests.support.randomized_models import randomized

GRID, B = (3, 2, 4), 2


def clips(**changes: object) -> ModelConfig:
    """Configuration of a model for clips of 3 x 2 x 4 tokens, with heads of 8 channels."""
    size = InputConfig(channels=2, frames=3, height=4, width=8)
    base = {"input": size, "hidden_size": 32, "num_heads": 4, "depth": 2, "condition": "none"}
    return ModelConfig(**{**base, **changes})


def stream(seed: int = 0) -> Tensor:
    return torch.randn(24, B, 32, generator=torch.Generator().manual_seed(seed))


def split_heads(qkv_SBW: Tensor) -> tuple[Tensor, ...]:
    """Split rows ordered (head, q/k/v, channel) into q, k, v [B, head, S, channel]."""
    return tuple(qkv_SBW.view(24, B, 4, 3, 8).permute(3, 1, 2, 0, 4))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v as [S, B, D], restricted to the `allowed` pairs [S, S]."""
    weights = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~allowed, -torch.inf).softmax(-1)
    return (weights @ v).permute(2, 0, 1, 3).flatten(2)


FRAME = torch.arange(24) // 8
PLACE = torch.arange(24) % 8


@pytest.mark.parametrize(
    ("kind", "block", "group"), [("joint", 1, torch.zeros(24)), ("factorized", 0, FRAME), ("factorized", 1, PLACE)]
)
def test_attention_is_full_spatial_or_temporal(kind: str, block: int, group: Tensor) -> None:
    """Equal to attention masked to a frame (spatial block) or to a position (temporal block)."""
    branch = randomized(clips(attention=kind)).blocks[str(block)].attention.branch
    x = stream()
    heads = plain_attention(*split_heads(branch.qkv(x)), group[:, None] == group[None])
    found = branch(x, Conditioning(torch.zeros(B, 32), GRID))
    torch.testing.assert_close(found, heads @ branch.out.weight.T)


def test_latte_adds_the_frames_positions_after_the_first_spatial_block() -> None:
    model = randomized(clips(attention="factorized"))
    seen = {}
    for i, block in model.blocks.items():
        block.register_forward_hook(lambda module, given, out, i=i: seen.update({i: (given[0], out)}))
    latents = torch.randn(B, 2, 3, 4, 8)
    model(latents, torch.rand(B))
    entered, left = seen["1"][0], seen["0"][1]
    torch.testing.assert_close((entered - left)[:, 0], model.pos_temporal[FRAME])
    z, _ = model.embed(latents, torch.rand(B), None)
    bare = z - model.pos_spatial.repeat(3, 1)[:, None]
    torch.testing.assert_close(bare[3, 1], model.patch_embed(latents[1, :, 0, :2, 6:8].reshape(-1)))


def test_images_pass_through_factorized_blocks() -> None:
    """With T = 1 a token attends to itself only in temporal attention."""
    model = randomized(clips(attention="factorized"))
    image = torch.randn(B, 2, 1, 4, 8)
    assert model(image, torch.rand(B)).shape == image.shape
    x = stream()[:8]
    branch = model.blocks["1"].attention.branch
    v = branch.qkv(x).view(8, B, 4, 3, 8)[:, :, :, 2].flatten(2)
    torch.testing.assert_close(branch(x, Conditioning(torch.zeros(B, 32), (1, 2, 4))), v @ branch.out.weight.T)


def test_long_skips_join_block_i_to_block_depth_minus_1_minus_i() -> None:
    """Compared with z + alpha W [modulated norm(z); norm(skip)] + beta, followed by the block's other branches."""
    model = randomized(clips(stacking="u", depth=5))
    assert [block.skip is not None for block in model.blocks.values()] == [False, False, False, True, True]
    z, conditioning = stream(), Conditioning(torch.randn(B, 32), GRID)
    outs = []
    for i, block in model.blocks.items():
        if block.skip is not None:
            shift, scale, g = block.modulation(torch.nn.functional.silu(conditioning.embedding)).split(32, -1)[:3]
            m, gate, layer = 12**-0.5, block.skip.gate, block.skip.branch.join  # 10 branches and 2 skips
            joined = torch.cat([layer_norm(z) * (1 + scale) + shift, layer_norm(outs[4 - int(i)])], -1)
            z = z + (m * gate.a + g) * (joined @ layer.weight.T + layer.bias) + m * gate.b
            vectors = block.modulation(torch.nn.functional.silu(conditioning.embedding)).split(32, -1)[3:]
            for branch, given in ((block.attention, vectors[:3]), (block.mlp, vectors[3:])):
                z = branch(z, conditioning, branch.modulation_parameters(given, z.dtype))
        else:
            z = block(z, conditioning)
        outs.append(z)
    torch.testing.assert_close(model.run_blocks(range(5), stream(), conditioning), z)


def layer_norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


def test_queries_and_keys_are_normalized_head_by_head() -> None:
    branch = randomized(clips(qk_norm=True)).blocks["0"].attention.branch
    x = stream()
    q, k, v = split_heads(branch.qkv(x))
    q, k = (
        part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale
        for part, scale in ((q, branch.norm.q_scale), (k, branch.norm.k_scale))
    )
    heads = plain_attention(q, k, v, torch.ones(24, 24, dtype=torch.bool))
    torch.testing.assert_close(branch(x, Conditioning(torch.zeros(B, 32), GRID)), heads @ branch.out.weight.T)
    assert build_model(clips(qk_norm=True)).blocks["1"].attention.branch.norm.q_scale.tolist() == [1.0] * 8


def test_rope_rotates_channel_pairs_by_position() -> None:
    """Heads of 8 channels: two pairs along T (frequencies 1 and 1/100), one along H, one along W (frequency 1)."""
    model = randomized(clips(positions="rotary"))
    assert dict(model.named_buffers()) == {}
    rope = model.conditioning(torch.zeros(B, 32), GRID).rope
    rotated = apply_rope(torch.tensor([1.0, 0, 0, 1, 1, 0, 1, 0]), rope[:, 2 * 8 + 1 * 4 + 3])  # at (2, 1, 3)
    expected = [math.cos(2), math.sin(2), -math.sin(0.02), math.cos(0.02), math.cos(1), math.sin(1), math.cos(3)]
    assert rotated.tolist() == pytest.approx([*expected, math.sin(3)], abs=1e-6)
    branch, x = model.blocks["0"].attention.branch, stream()
    q, k, v = split_heads(branch.qkv(x))
    heads = plain_attention(apply_rope(q, rope), apply_rope(k, rope), v, torch.ones(24, 24, dtype=torch.bool))
    found = branch(x, Conditioning(torch.zeros(B, 32), GRID, rope=rope))
    torch.testing.assert_close(found, heads @ branch.out.weight.T)


def test_with_rope_attention_depends_on_relative_positions() -> None:
    """The product of a query and a key stays the same when both positions move by one."""
    rope = axial_rope(8, (1, 5, 6), clips=False).view(2, 5, 6, 4)
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).unbind()

    def product(a: tuple[int, int], b: tuple[int, int]) -> float:
        return float(apply_rope(q, rope[:, *a]) @ apply_rope(k, rope[:, *b]))

    assert product((0, 1), (2, 4)) == pytest.approx(product((1, 2), (3, 5)), rel=1e-4)
    assert product((0, 1), (2, 4)) != pytest.approx(product((0, 1), (2, 3)), rel=1e-2)


def test_rotary_models_accept_other_sizes_and_distinguish_positions() -> None:
    model = randomized(clips(positions="rotary"))
    latents = torch.randn(B, 2, 2, 8, 4)
    out = model(latents, torch.rand(B))
    assert out.shape == latents.shape
    still = torch.ones(1, 2, 1, 4, 8).cumsum(-1)
    moved = still.flip(-1)
    assert not torch.allclose(model(still, torch.ones(1)).flip(-1), model(moved, torch.ones(1)), atol=1e-3)


def captions(model: DiffusionTransformer, lengths: tuple[int, ...]) -> TextCondition:
    text, generator = model.config.text, torch.Generator().manual_seed(3)
    return TextCondition.from_captions(
        [(torch.randn(n, text.width, generator=generator), torch.randn(text.pooled_width)) for n in lengths]
    )


TEXT = {"condition": "text", "text": TextConfig(width=12, pooled_width=6)}


def test_cross_attention_attends_to_the_caption_of_each_sample() -> None:
    """Each sample attends to the tokens of its own caption, and not to padding."""
    model = randomized(clips(**TEXT, qk_norm=True))
    branch, x, text = model.blocks["0"].cross_attention.branch, stream(), captions(model, (5, 2))
    found = branch(x, Conditioning(torch.zeros(B, 32), GRID, text))
    for b, n in enumerate((5, 2)):
        kv = branch.kv(layer_norm(text.tokens[b, :n])).view(n, 4, 2, 8)
        q, k = branch.norm(branch.q(x[:, b]).view(24, 4, 8), kv[:, :, 0])
        weights = (torch.einsum("shc,nhc->hsn", q, k) / 8**0.5).softmax(-1)
        heads = torch.einsum("hsn,nhc->shc", weights, kv[:, :, 1]).flatten(1)
        torch.testing.assert_close(found[:, b], heads @ branch.out.weight.T)


def test_predictions_depend_on_caption_tokens_and_pooled_vector() -> None:
    model = randomized(clips(**TEXT))
    assert [type(b.branch).__name__ for b in model.blocks["0"].branches()] == ["Attention", "CrossAttention", "Mlp"]
    assert model.config.branches == 6
    latents, t, text = torch.randn(B, 2, 3, 4, 8), torch.rand(B), captions(model, (4, 3))
    out = model(latents, t, text)
    assert torch.allclose(model(latents, t, text.pad_to(9)), out, atol=1e-5)
    others = text.tokens.clone()
    others[1, 3:] = 7.0  # behind the end of the second caption
    assert torch.allclose(model(latents, t, text._replace(tokens=others)), out, atol=1e-5)
    others[1, 0] = 7.0
    moved = (model(latents, t, text._replace(tokens=others)) - out).abs().amax((1, 2, 3, 4))
    assert moved[0] < 1e-5 and moved[1] > 1e-3
    moved = (model(latents, t, text._replace(pooled=text.pooled + 1)) - out).abs().amax((1, 2, 3, 4))
    assert moved.min() > 1e-3


def test_every_parameter_of_every_branch_has_a_gradient() -> None:
    model = randomized(clips(**TEXT, stacking="u", qk_norm=True, positions="rotary", attention="factorized"))
    model(torch.randn(B, 2, 3, 4, 8), torch.rand(B), captions(model, (4, 3))).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []
