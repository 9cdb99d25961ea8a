"""Depth growth: origins of the blocks, unchanged function, and new blocks that learn."""

import pytest
import torch

from rdm_scale.config import InputConfig
from rdm_scale.errors import ConfigError
from rdm_scale.models import build_model
from rdm_scale.models.depth_growth import BlockOrigin, DepthGrowth, block_origins
from tests.support.grown_models import CAN_GROW, batch, deeper, grown_weights, model_config
from tests.support.randomized_models import randomized

LR = 1e-2


def notation(placed: tuple[BlockOrigin, ...]) -> str:
    """Text form of block origins: old blocks as digits, fresh ones as dots, copies as digits in brackets."""
    signs = {o: "." if o.block is None else f"({o.block})" if o.is_new else str(o.block) for o in placed}
    return "".join(signs[o] for o in placed)


@pytest.mark.parametrize(
    ("old", "new", "placement", "stacking", "expected"),
    [
        (3, 6, "interleaved", "flow", "0.1.2."),
        (6, 9, "interleaved", "flow", "01.23.45."),
        (4, 5, "interleaved", "flow", "0123."),
        (2, 7, "interleaved", "flow", "0..1..."),
        (3, 5, "appended", "flow", "012.."),
        (2, 6, "stacked", "flow", "01(0)(1)(0)(1)"),
        (4, 8, "interleaved", "u", "0.1..2.3"),
        (5, 9, "interleaved", "u", "0.1.2.3.4"),
        (4, 10, "appended", "u", "01......23"),
        (4, 8, "stacked", "u", "01(0)(1)(2)(3)23"),
    ],
)
def test_placement(old: int, new: int, placement: str, stacking: str, expected: str) -> None:
    assert notation(block_origins(old, new, placement, stacking)) == expected


@pytest.mark.parametrize(
    ("placement", "expected"),
    [("interleaved", "01..23.."), ("appended", "0123...."), ("stacked", "0123(0)(1)(2)(3)")],
)
def test_alternating_blocks_stay_together(placement: str, expected: str) -> None:
    assert notation(block_origins(4, 8, placement, kinds=2)) == expected
    with pytest.raises(ConfigError, match=r"2 kinds of blocks alternate, .* must be a multiple: 7 is not"):
        block_origins(4, 7, placement, kinds=2)


@pytest.mark.parametrize("placement", ["interleaved", "appended", "stacked"])
@pytest.mark.parametrize(("old", "new"), [(2, 4), (3, 9), (4, 12), (5, 9), (7, 13), (12, 48)])
def test_a_u_stack_stays_symmetric_and_keeps_its_pairs(old: int, new: int, placement: str) -> None:
    if placement == "stacked" and (new // 2) % (old // 2):
        pytest.skip("not a multiple")
    placed = block_origins(old, new, placement, "u")
    assert len(placed) == new
    assert [o.block for o in placed if not o.is_new] == list(range(old))
    for first, last in zip(placed, reversed(placed), strict=True):
        assert first.is_new == last.is_new
        assert (first.block is None and last.block is None) or first.block + last.block == old - 1


@pytest.mark.parametrize(
    ("old", "new", "placement", "stacking", "message"),
    [
        (6, 6, "interleaved", "flow", "6 blocks can only grow to more blocks, not to 6"),
        (6, 3, "appended", "flow", "not to 3"),
        (6, -1, "appended", "u", "not to -1"),
        (4, 10, "stacked", "flow", "must be a multiple of the old, and 10 blocks are not one of 4"),
        (4, 7, "interleaved", "u", "grows by pairs of blocks.*4 blocks cannot become 7; choose 8"),
        (1, 3, "interleaved", "u", "must have at least one pair"),
        (4, 8, "sideways", "flow", "'sideways': choose interleaved, appended, stacked"),
    ],
)
def test_impossible_placements_are_refused(old: int, new: int, placement: str, stacking: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        block_origins(old, new, placement, stacking)


def test_models_that_cannot_grow_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.residual=plain cannot grow"):
        DepthGrowth(model_config(2, residual="plain"), 4)


@pytest.mark.parametrize("placement", ["interleaved", "appended", "stacked"])
@pytest.mark.parametrize("kind", CAN_GROW)
def test_the_grown_network_computes_the_same_function(kind: str, placement: str) -> None:
    model = randomized(model_config(3, **CAN_GROW[kind]))
    for depth in (6, 9):
        grown = deeper(DepthGrowth(model.config, depth, placement), model)
        with torch.no_grad():
            expected, found = model(*batch()), grown(*batch())
        assert ((found - expected).norm() / expected.norm()).item() < 1e-6
        assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-6


@pytest.mark.parametrize("placement", ["interleaved", "appended", "stacked"])
def test_factorized_attention_grows_by_pairs(placement: str) -> None:
    """A spatial block in place of a temporal one would change the function."""
    clips = InputConfig(frames=3, height=8, width=8)
    model = randomized(model_config(4, input=clips, attention="factorized"))
    latents = torch.randn(4, 4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(latents, *batch()[1:])
        found = deeper(DepthGrowth(model.config, 8, placement), model)(latents, *batch()[1:])
    assert ((found - expected).norm() / expected.norm()).item() < 1e-6


@pytest.mark.parametrize("placement", ["interleaved", "appended", "stacked"])
@pytest.mark.parametrize("depths", [(4, 8), (5, 9)], ids=str)
@pytest.mark.parametrize("kind", ["neural_rdm", "adaln_zero", "rezero"])
def test_a_u_stack_grows_by_pairs_whose_long_skips_add_nothing(
    kind: str, depths: tuple[int, int], placement: str
) -> None:
    model = randomized(model_config(depths[0], stacking="u", **CAN_GROW[kind]))
    grown = deeper(DepthGrowth(model.config, depths[1], placement), model)
    with torch.no_grad():
        expected, found = model(*batch()), grown(*batch())
    assert ((found - expected).norm() / expected.norm()).item() < 1e-6


@pytest.mark.parametrize("kind", CAN_GROW)
def test_new_blocks_learn_from_the_first_step_on(kind: str) -> None:
    model = randomized(model_config(2, **CAN_GROW[kind]))
    growth = DepthGrowth(model.config, 4)
    grown = deeper(growth, model)
    optimizer = torch.optim.AdamW(grown.parameters(), lr=LR)
    before = {name: p.detach().clone() for name, p in grown.named_parameters()}
    for _ in range(2):  # the first step changes the gates, the second the branches behind them
        optimizer.zero_grad()
        grown(*batch()).square().mean().backward()
        optimizer.step()
    moved = {name for name, p in grown.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in before if growth.is_new(name)} <= moved


def test_copies_have_the_old_branches_and_zero_gates() -> None:
    model = randomized(model_config(2))
    old = dict(model.named_parameters())
    grown = grown_weights(DepthGrowth(model.config, 4, "stacked"), old)
    assert torch.equal(grown["blocks.3.mlp.branch.up.weight"], old["blocks.1.mlp.branch.up.weight"])
    rows = grown["blocks.3.modulation.weight"].view(6, 32, 32)  # of attention and MLP: shift, scale, g
    expected = old["blocks.1.modulation.weight"].view(6, 32, 32)
    for i, zero in enumerate([False, False, True, False, False, True]):
        assert torch.equal(rows[i], torch.zeros(32, 32) if zero else expected[i])
    assert not grown["blocks.3.attention.gate.a"].any()


def test_fresh_branches_do_not_repeat_initial_values_of_other_blocks() -> None:
    name = "blocks.1.mlp.branch.up.weight"
    untrained = dict(build_model(model_config(2)).named_parameters())
    four = grown_weights(DepthGrowth(model_config(2), 4), untrained)
    eight = grown_weights(DepthGrowth(model_config(4), 8), four)
    assert not torch.equal(four[name], untrained[name])
    assert not torch.equal(eight[name], four[name])
    deviation = untrained[name].std()  # both uniform with the same bound
    assert torch.allclose(four[name].std(), deviation, rtol=0.05)
