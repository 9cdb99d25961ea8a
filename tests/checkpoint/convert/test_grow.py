"""Depth growth of a checkpoint: all state entries, the optimizer state in particular, and refused checkpoints."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rdm_scale.checkpoint import CheckpointDirectory
from rdm_scale.checkpoint.convert.checkpoint_writer import STATE_ENTRIES, write_checkpoint
from rdm_scale.checkpoint.convert.grow import grow_checkpoint, grown_entry, initial_entry
from rdm_scale.checkpoint.directory import open_checkpoint
from rdm_scale.errors import CheckpointError, ConfigError
from rdm_scale.models import DiffusionTransformer, build_model
from rdm_scale.models.depth_growth import DepthGrowth
from rdm_scale.storage.location import Location
from tests.support.grown_models import CAN_GROW, batch, deeper, map_grown, model_config
from tests.support.randomized_models import randomized
from tests.support.small_runs import run_config

BETAS, LR = (0.9, 0.95), 1e-2
ALONE = {"tensor": 1, "pipeline": 1, "data": 1}


def grow_entry(growth: DepthGrowth, values: dict[str, Tensor], entry: str) -> dict[str, Tensor]:
    """One state entry of all parameters of the grown model."""
    return map_grown(
        growth,
        lambda name, source: grown_entry(growth, name, entry, source),
        lambda name, shape: initial_entry(growth, name, entry, tuple(shape), 0),
        values,
    )


def steps_of_adam(model: DiffusionTransformer, optimizer: torch.optim.Optimizer, count: int) -> None:
    generator = torch.Generator().manual_seed(4)
    target = torch.randn(4, 4, 1, 8, 8, generator=generator)
    for _ in range(count):
        optimizer.zero_grad()
        (model(*batch()) - target).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", CAN_GROW)
def test_the_next_step_moves_old_parameters_as_if_nothing_had_grown(kind: str) -> None:
    """Adam's update does not depend on the size of the gradients as long as its state matches them: an old gate moves
    by as much as without growth, and all other old parameters become what they would have been.
    """
    model = randomized(model_config(3, **CAN_GROW[kind]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=1e-12, weight_decay=0.0)
    steps_of_adam(model, optimizer, 3)
    growth = DepthGrowth(model.config, 12)
    grown = deeper(growth, model)
    moved = torch.optim.AdamW(grown.parameters(), lr=LR, betas=BETAS, eps=1e-12, weight_decay=0.0)
    for entry in ("exp_avg", "exp_avg_sq"):
        values = {name: optimizer.state[p][entry] for name, p in model.named_parameters()}
        grown_values = grow_entry(growth, values, entry)
        for (name, p), (same, value) in zip(grown.named_parameters(), grown_values.items(), strict=True):
            assert name == same
            moved.state[p] |= {"step": torch.tensor(3.0), entry: value}
            assert not (growth.is_new(name) and value.any())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    grown_before = {name: p.detach().clone() for name, p in grown.named_parameters()}
    steps_of_adam(model, optimizer, 1)
    steps_of_adam(grown, moved, 1)
    after, grown_after = dict(model.named_parameters()), dict(grown.named_parameters())
    for name in grown_after:
        source = growth.source(name)
        # The keys' biases, and a scalar b, which adds the same to all channels, have no effect: their gradients are
        # rounding errors.
        no_effect = name.endswith("qkv.bias") or (name.endswith(".gate.b") and grown_after[name].numel() == 1)
        if not growth.is_new(name) and not no_effect:
            expected, found = after[source] - before[source], grown_after[name] - grown_before[name]
            assert expected.any(), name
            assert ((found - expected).norm() / expected.norm()).item() < 2e-3, name


def test_gates_are_multiplied_by_powers_of_the_ratio_of_multipliers() -> None:
    """2 to 8 blocks at p = 1/2: m(4) / m(16) = (4 / 16)^-1/2 = 2."""
    growth = DepthGrowth(model_config(2), 8)
    for entry, factor in (("weights", 2.0), ("ema", 2.0), ("exp_avg", 0.5), ("exp_avg_sq", 0.25)):
        assert grown_entry(growth, "blocks.4.mlp.gate.b", entry, torch.ones(32)).tolist() == [factor] * 32
        for name in ("blocks.4.mlp.branch.down.bias", "blocks.4.modulation.bias", "head.out.bias"):
            assert grown_entry(growth, name, entry, torch.ones(192)).tolist() == [1.0] * 192


def test_copies_start_without_optimizer_state() -> None:
    values = dict(randomized(model_config(2)).named_parameters())
    grown = grow_entry(DepthGrowth(model_config(2), 4, "stacked"), values, "exp_avg")
    assert not grown["blocks.3.mlp.branch.up.weight"].any()
    assert torch.equal(grown["blocks.1.mlp.branch.up.weight"], values["blocks.1.mlp.branch.up.weight"])


def handmade(tmp_path: Path, residual: str = "neural_rdm", **changes: object) -> Path:
    """A checkpoint of 2 blocks in which all elements of a state entry are equal; `changes` apply to its state or, by
    name, to its tensors.
    """
    config = run_config(tmp_path, "none", model__depth=2, model__residual=residual)
    state = {"step": 4, "config": config.model_dump(mode="json"), "identity": config.identity(), "layout": ALONE}
    numbers = dict(zip(STATE_ENTRIES, (1.0, 2.0, 4.0, 8.0), strict=True))
    tensors = {
        name: {entry: torch.full(parameter.shape, number) for entry, number in numbers.items()}
        for name, parameter in build_model(config.model).named_parameters()
    }
    for key, value in changes.items():
        target = state if key in state else tensors
        if value is None:
            del target[key]
        else:
            target[key] = value
    write_checkpoint(CheckpointDirectory(Location(tmp_path / "hand")), state, tensors.items())
    return tmp_path / "hand"


def test_every_state_entry_of_a_checkpoint_is_grown(tmp_path: Path) -> None:
    """From 2 to 8 blocks, gates are multiplied by 2 and their gradients by 1/2; block 4 is the old block 1, block 5 is
    new.
    """
    grown = grow_checkpoint(str(handmade(tmp_path)), 8, str(tmp_path / "grown"))
    state, reader = open_checkpoint(grown.folder)
    assert (state["config"]["model"]["depth"], state["grown_from"]["depth"]) == (8, 2)
    values = [
        {name: sorted(set(reader.read(entry, name).flatten().tolist())) for name in reader.names()}
        for entry in STATE_ENTRIES
    ]
    for name, expected in {
        "blocks.4.mlp.gate.a": [2.0, 1.0, 1.0, 16.0],
        "blocks.4.mlp.branch.up.weight": [1.0, 2.0, 4.0, 8.0],
        "blocks.5.mlp.gate.a": [0.0, 0.0, 0.0, 0.0],
        "class_embed.weight": [1.0, 2.0, 4.0, 8.0],
    }.items():
        assert [value[name] for value in values] == [[number] for number in expected]
    weights, first, second, ema = (value["blocks.5.mlp.branch.up.weight"] for value in values)
    assert weights == ema
    assert len(weights) > 1000
    assert first == second == [0.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"residual": "plain"}, "model.residual=plain cannot grow"),
        ({"config": None}, "is not valid"),
        ({"config": {"model": {"depth": 1}}}, "run is missing"),
        ({"identity": [1]}, "does not identify its run"),
        ({"head.out.bias": None}, "lacks the tensor head.out.bias"),
        ({"blocks.2.mlp.gate.a": dict.fromkeys(STATE_ENTRIES, torch.ones(32))}, "has the tensor blocks.2.mlp.gate.a"),
        (
            {"head.out.bias": dict.fromkeys(STATE_ENTRIES, torch.ones(3))},
            r"head.out.bias has shape \[3\], but its configuration says \[16\]",
        ),
    ],
)
def test_a_checkpoint_that_contradicts_its_state_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises((CheckpointError, ConfigError), match=message):
        grow_checkpoint(str(handmade(tmp_path, **changes)), 4, str(tmp_path / "grown"))
    assert not (tmp_path / "grown").exists()


def test_a_missing_checkpoint_is_reported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a complete checkpoint nor a run"):
        grow_checkpoint(str(tmp_path), 4, str(tmp_path / "grown"))
