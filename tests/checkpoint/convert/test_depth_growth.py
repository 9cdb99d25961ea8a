"""Growing in depth: which block comes from where, that nothing of the function changes, and what Adam makes of it."""

import pytest
import torch
from torch import Tensor

from rdm_scale.checkpoint.convert.depth_growth import Growth, Origin, origins
from rdm_scale.config import GateConfig, InputConfig, ModelConfig
from rdm_scale.errors import ConfigError
from rdm_scale.models import DiffusionTransformer, build_model

CAN_GROW = {
    "rezero": {"residual": "rezero"},
    "layerscale": {"residual": "layerscale"},
    "adaln_zero": {"residual": "adaln_zero"},
    "neural_rdm": {},
    "neural_rdm, unconditional": {"gate": GateConfig(conditional=False)},
    "adaln_zero, base of two blocks": {"residual": "adaln_zero", "base_depth": 2},
    "neural_rdm, base of three blocks": {"base_depth": 3},
    "neural_rdm, scalar gates, p = 1": {"gate": GateConfig(per_channel=False, exponent=1.0, multiplier=3.0)},
}
BETAS, LR = (0.9, 0.95), 1e-2


def config(depth: int, **changes: object) -> ModelConfig:
    base = {"input": InputConfig(height=8, width=8), "hidden_size": 32, "num_heads": 4, "num_classes": 10}
    return ModelConfig(**{**base, "depth": depth, **changes})


def written(placed: tuple[Origin, ...]) -> str:
    """Old blocks as digits, fresh ones as dots, copies as digits in brackets."""
    signs = {o: "." if o.block is None else f"({o.block})" if o.closed else str(o.block) for o in placed}
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
    assert written(origins(old, new, placement, stacking)) == expected


@pytest.mark.parametrize(
    ("placement", "expected"),
    [("interleaved", "01..23.."), ("appended", "0123...."), ("stacked", "0123(0)(1)(2)(3)")],
)
def test_blocks_that_take_turns_stay_together(placement: str, expected: str) -> None:
    assert written(origins(4, 8, placement, turns=2)) == expected
    with pytest.raises(ConfigError, match="2 kinds of blocks take turns, and 7 blocks do not end with the last"):
        origins(4, 7, placement, turns=2)


@pytest.mark.parametrize("placement", ["interleaved", "appended", "stacked"])
@pytest.mark.parametrize(("old", "new"), [(2, 4), (3, 9), (4, 12), (5, 9), (7, 13), (12, 48)])
def test_a_u_stack_stays_symmetric_and_every_block_keeps_its_partner(old: int, new: int, placement: str) -> None:
    if placement == "stacked" and (new // 2) % (old // 2):
        pytest.skip("not a multiple")
    placed = origins(old, new, placement, "u")
    assert len(placed) == new
    assert [o.block for o in placed if not o.closed] == list(range(old))
    for first, last in zip(placed, reversed(placed), strict=True):
        assert first.closed == last.closed
        assert (first.block is None and last.block is None) or first.block + last.block == old - 1


@pytest.mark.parametrize(
    ("old", "new", "placement", "stacking", "message"),
    [
        (6, 6, "interleaved", "flow", "6 blocks grows to more of them, not to 6"),
        (6, 3, "appended", "flow", "not to 3"),
        (6, -1, "appended", "u", "not to -1"),
        (4, 10, "stacked", "flow", "must be a multiple of the old, and 10 blocks are not one of 4"),
        (4, 7, "interleaved", "u", "grows by pairs of blocks.*4 blocks cannot become 7; choose 8"),
        (1, 3, "interleaved", "u", "from one pair on"),
        (4, 8, "sideways", "flow", "'sideways': choose interleaved, appended, stacked"),
    ],
)
def test_what_cannot_be_placed_is_refused(old: int, new: int, placement: str, stacking: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        origins(old, new, placement, stacking)


def test_models_that_cannot_grow_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.residual=plain cannot grow"):
        Growth(config(2, residual="plain"), 4)


def trained(model_config: ModelConfig) -> DiffusionTransformer:
    """A model with no parameter at its start, gates and modulation in particular."""
    model = build_model(model_config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def grow(growth: Growth, values: dict[str, Tensor], field: str = "weights") -> dict[str, Tensor]:
    """All tensors of the grown model in one field."""
    grown = {}
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in build_model(growth.new).named_parameters()}
    for name, shape in shapes.items():
        source = growth.source(name)
        if source is None:
            grown[name] = growth.fresh(name, field, shape, 0)
        else:
            grown[name] = growth.carried(name, field, values[source].clone())
    return grown


def deeper(growth: Growth, model: DiffusionTransformer) -> DiffusionTransformer:
    grown = build_model(growth.new, seed=7)
    grown.load_state_dict(grow(growth, dict(model.named_parameters())))
    return grown


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(4, 4, 1, 8, 8, generator=generator), torch.tensor([1.0, 200, 700, 990]), torch.arange(4)


@pytest.mark.parametrize("placement", ["interleaved", "appended", "stacked"])
@pytest.mark.parametrize("kind", CAN_GROW)
def test_the_grown_network_computes_the_same_function(kind: str, placement: str) -> None:
    model = trained(config(3, **CAN_GROW[kind]))
    for depth in (6, 9):
        grown = deeper(Growth(model.config, depth, placement), model)
        with torch.no_grad():
            expected, found = model(*batch()), grown(*batch())
        assert ((found - expected).norm() / expected.norm()).item() < 1e-6
        assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-6


@pytest.mark.parametrize("placement", ["interleaved", "appended", "stacked"])
def test_factorized_attention_grows_by_pairs(placement: str) -> None:
    """A spatial block in the place of a temporal one would be another function."""
    clips = InputConfig(frames=3, height=8, width=8)
    model = trained(config(4, input=clips, attention="factorized"))
    latents = torch.randn(4, 4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(latents, *batch()[1:])
        found = deeper(Growth(model.config, 8, placement), model)(latents, *batch()[1:])
    assert ((found - expected).norm() / expected.norm()).item() < 1e-6


@pytest.mark.parametrize("placement", ["interleaved", "appended", "stacked"])
@pytest.mark.parametrize("depths", [(4, 8), (5, 9)], ids=str)
@pytest.mark.parametrize("kind", ["neural_rdm", "adaln_zero", "rezero"])
def test_a_u_stack_grows_by_pairs_whose_long_skips_are_closed(
    kind: str, depths: tuple[int, int], placement: str
) -> None:
    model = trained(config(depths[0], stacking="u", **CAN_GROW[kind]))
    grown = deeper(Growth(model.config, depths[1], placement), model)
    with torch.no_grad():
        expected, found = model(*batch()), grown(*batch())
    assert ((found - expected).norm() / expected.norm()).item() < 1e-6


@pytest.mark.parametrize("kind", CAN_GROW)
def test_new_blocks_learn_from_the_first_step_on(kind: str) -> None:
    model = trained(config(2, **CAN_GROW[kind]))
    growth = Growth(model.config, 4)
    grown = deeper(growth, model)
    optimizer = torch.optim.AdamW(grown.parameters(), lr=LR)
    before = {name: p.detach().clone() for name, p in grown.named_parameters()}
    for _ in range(2):  # the first step opens the gates, the second moves what is behind them
        optimizer.zero_grad()
        grown(*batch()).square().mean().backward()
        optimizer.step()
    moved = {name for name, p in grown.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in before if growth.is_new(name)} <= moved


def test_copies_carry_the_old_branches_behind_closed_gates() -> None:
    model = trained(config(2))
    old = dict(model.named_parameters())
    grown = grow(Growth(model.config, 4, "stacked"), old)
    assert torch.equal(grown["blocks.3.mlp.branch.up.weight"], old["blocks.1.mlp.branch.up.weight"])
    rows = grown["blocks.3.modulation.weight"].view(6, 32, 32)  # of attention and MLP: shift, scale, g
    expected = old["blocks.1.modulation.weight"].view(6, 32, 32)
    for i, zero in enumerate([False, False, True, False, False, True]):
        assert torch.equal(rows[i], torch.zeros(32, 32) if zero else expected[i])
    assert not grown["blocks.3.attention.gate.a"].any()
    moments = grow(Growth(model.config, 4, "stacked"), old, "exp_avg")
    assert not moments["blocks.3.mlp.branch.up.weight"].any()
    assert torch.equal(moments["blocks.1.mlp.branch.up.weight"], old["blocks.1.mlp.branch.up.weight"])


def test_fresh_branches_repeat_no_other_block_s_first_values() -> None:
    name = "blocks.1.mlp.branch.up.weight"
    untrained = dict(build_model(config(2)).named_parameters())
    four = grow(Growth(config(2), 4), untrained)
    eight = grow(Growth(config(4), 8), four)
    assert not torch.equal(four[name], untrained[name])
    assert not torch.equal(eight[name], four[name])
    deviation = untrained[name].std()  # both uniform with the same bound
    assert torch.allclose(four[name].std(), deviation, rtol=0.05)


def steps_of_adam(model: DiffusionTransformer, optimizer: torch.optim.Optimizer, count: int) -> None:
    generator = torch.Generator().manual_seed(4)
    target = torch.randn(4, 4, 1, 8, 8, generator=generator)
    for _ in range(count):
        optimizer.zero_grad()
        (model(*batch()) - target).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", CAN_GROW)
def test_the_next_step_moves_old_parameters_as_if_nothing_had_grown(kind: str) -> None:
    """Adam's update does not depend on the size of gradients as long as its moments fit them: a multiplied gate moves
    by as much as the gate would have moved, all other old parameters are what they would have been."""
    model = trained(config(3, **CAN_GROW[kind]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=1e-12, weight_decay=0.0)
    steps_of_adam(model, optimizer, 3)
    growth = Growth(model.config, 12)
    grown = deeper(growth, model)
    moved = torch.optim.AdamW(grown.parameters(), lr=LR, betas=BETAS, eps=1e-12, weight_decay=0.0)
    for field in ("exp_avg", "exp_avg_sq"):
        values = {name: optimizer.state[p][field] for name, p in model.named_parameters()}
        for (name, p), (same, value) in zip(grown.named_parameters(), grow(growth, values, field).items(), strict=True):
            assert name == same
            moved.state[p] |= {"step": torch.tensor(3.0), field: value}
            assert not (growth.is_new(name) and value.any())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    grown_before = {name: p.detach().clone() for name, p in grown.named_parameters()}
    steps_of_adam(model, optimizer, 1)
    steps_of_adam(grown, moved, 1)
    after, grown_after = dict(model.named_parameters()), dict(grown.named_parameters())
    for name in grown_after:
        source = growth.source(name)
        # Keys' biases, and what a scalar b adds to all channels alike, change nothing: their gradients are rounding.
        nothing = name.endswith("qkv.bias") or (name.endswith(".gate.b") and grown_after[name].numel() == 1)
        if not growth.is_new(name) and not nothing:
            expected, found = after[source] - before[source], grown_after[name] - grown_before[name]
            assert expected.any(), name
            assert ((found - expected).norm() / expected.norm()).item() < 2e-3, name


def test_gates_and_their_moments_are_multiplied_by_powers_of_the_ratio_of_multipliers() -> None:
    """2 to 8 blocks at p = 1/2: m(4) / m(16) = (4 / 16)^-1/2 = 2."""
    growth = Growth(config(2), 8)
    for field, factor in (("weights", 2.0), ("ema", 2.0), ("exp_avg", 0.5), ("exp_avg_sq", 0.25)):
        assert growth.carried("blocks.4.mlp.gate.b", field, torch.ones(32)).tolist() == [factor] * 32
        for name in ("blocks.4.mlp.branch.down.bias", "blocks.4.modulation.bias", "head.out.bias"):
            assert growth.carried(name, field, torch.ones(192)).tolist() == [1.0] * 192
