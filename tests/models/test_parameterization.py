"""CompleteP: scaled parameters, a base of the model's own size, and updates of the same size at every size."""

import pytest
import torch
from torch import Tensor, nn

from rdm_scale.config import InputConfig, ModelConfig, OptimizerConfig, TextConfig
from rdm_scale.models import build_model
from rdm_scale.models.parameterization import depth_ratio, inputs_grow, rates, width_ratio
from rdm_scale.training.optimizer import build_optimizer

IMAGE = {"input": InputConfig(height=8, width=8), "num_classes": 10}
SMALL = IMAGE | {"hidden_size": 32, "num_heads": 4, "depth": 2}
TEXT = {"condition": "text", "text": TextConfig(width=24, pooled_width=24)}
FAMILY = [{}, TEXT, {"stacking": "u", "depth": 4}, {"qk_norm": True}, {"residual": "layerscale"}]


@pytest.mark.parametrize("changes", FAMILY, ids=str)
def test_matrices_whose_inputs_grow_are_found_by_their_shapes(changes: dict) -> None:
    """Compare the rule by name, which also works on sharded ranks, with the shapes of models of two widths."""

    def shapes(width: int) -> dict[str, torch.Size]:
        config = ModelConfig(**(SMALL | changes | {"hidden_size": width}))
        return {name: p.shape for name, p in build_model(config).named_parameters()}

    small, wide = shapes(32), shapes(64)
    for name, shape in small.items():
        # An embedding selects rows and sums nothing: its inputs are classes, which are its first dimension.
        expected = len(shape) == 2 and wide[name][1] == 2 * shape[1] and name != "class_embed.weight"
        assert inputs_grow(name) == expected, name


def test_rates_of_a_model_four_times_as_wide_and_eight_times_as_deep() -> None:
    config = ModelConfig(**(SMALL | {"hidden_size": 128, "depth": 16, "base_width": 32, "base_depth": 2}))
    ratios = (width_ratio(config), depth_ratio(config))
    assert ratios == (4, 1 / 8)
    assert rates("blocks.3.mlp.branch.up.weight", *ratios) == (1 / 4, 4, 1 / 32)
    assert rates("blocks.3.attention.gate.a", *ratios) == (1, 1, 1 / 32)
    assert rates("patch_embed.weight", *ratios) == (1, 1, 1 / 4)
    assert rates("head.out.weight", *ratios) == (1 / 4, 4, 1)
    assert rates("head.out.bias", *ratios) == (1, 1, 1)


def test_a_base_of_the_same_size_changes_nothing() -> None:
    plain, based = (ModelConfig(**(SMALL | base)) for base in ({}, {"base_width": 32, "base_depth": 2}))
    first, second = (list(build_model(config).named_parameters()) for config in (plain, based))
    for (name, one), (_, other) in zip(first, second, strict=True):
        assert torch.equal(one, other)
        assert rates(name, width_ratio(based), depth_ratio(based)) == (1, 1, 1)
    for residual in ("plain", "neural_rdm"):
        z = [change(2, c, residual=residual) for c in ({}, {"base_depth": 2, "base_width": 32})]
        assert z[0] == z[1]


def test_initial_embeddings_do_not_depend_on_the_width() -> None:
    """With a base, patches and timesteps contribute the same to a channel at any width; without, patches less."""
    sizes = {}
    for width in (32, 512):
        for base in (None, 32):
            model = build_model(ModelConfig(**(SMALL | {"hidden_size": width, "base_width": base})))
            latents = torch.randn(64, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
            model.pos_spatial.zero_()
            z, conditioning = model.embed(latents, torch.linspace(0, 1000, 64), torch.arange(64) % 10)
            sizes[width, base] = (z.std().item(), conditioning.embedding.std().item())
    assert sizes[512, 32] == pytest.approx(sizes[32, 32], rel=0.15)
    assert sizes[512, None][0] < 0.5 * sizes[32, None][0]


def change(depth: int, base: dict, steps: int = 4, width: int = 32, residual: str = "neural_rdm") -> float:
    """Relative change (root mean square) of the last hidden states by a few steps of Adam."""
    size = {"hidden_size": width, "num_heads": width // 8, "depth": depth, "residual": residual}
    config = ModelConfig(**(IMAGE | size | base))
    model = build_model(config)
    fill_last_layer(model)
    optimizer = build_optimizer(OptimizerConfig(lr=2e-3, eps=1e-12), config, model)
    generator = torch.Generator().manual_seed(1)
    latents, target = (torch.randn(16, 4, 1, 8, 8, generator=generator) for _ in range(2))
    t, labels = torch.linspace(0, 1000, 16), torch.arange(16) % 10

    def stream() -> Tensor:
        z, conditioning = model.embed(latents, t, labels)
        return model.run_blocks(range(depth), z, conditioning)

    before = stream().detach()
    for _ in range(steps):
        optimizer.zero_grad()
        ((model(latents, t, labels) - target) ** 2).mean().backward()
        optimizer.step()
    after = stream().detach()
    return ((after - before).square().mean().sqrt() / before.square().mean().sqrt()).item()


@torch.no_grad()
def fill_last_layer(model: nn.Module) -> None:
    """Fill the last layer as training would, with values whose effect does not depend on the width.

    It is initialized to zero, so that no block would have a gradient in the first step.
    """
    generator = torch.Generator().manual_seed(2)
    weight = model.head.out.weight
    weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[1])


def test_size_of_updates_does_not_depend_on_depth() -> None:
    """Coordinate check along depth: the same learning rate with 16 times the blocks."""
    shallow, deep = (change(depth, {"base_depth": 2}) for depth in (2, 32))
    assert deep == pytest.approx(shallow, rel=0.3)
    assert change(32, {}) > 1.7 * change(2, {}), "without a base the size of updates must differ"


def test_size_of_updates_does_not_depend_on_width() -> None:
    narrow, wide = (change(2, {"base_width": 32}, width=width) for width in (32, 256))
    assert wide == pytest.approx(narrow, rel=0.4)
    assert change(2, {}, width=256) > 2 * change(2, {}, width=32), "without a base the size of updates must differ"
