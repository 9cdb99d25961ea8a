"""Compilation: one graph for each kind of block, without breaks, that computes what the eager block does."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from rdm_scale.batch import ModelInputs
from rdm_scale.conditions import TextCondition
from rdm_scale.config import RunConfig, parse_config
from rdm_scale.errors import ConfigError
from rdm_scale.models import DiffusionTransformer
from rdm_scale.parallel import compile
from rdm_scale.parallel.compile import CompiledBlocks, wants_compilation
from tests.support.randomized_models import randomized

CLIPS = {"input": {"channels": 4, "frames": 2, "height": 4, "width": 4}, "attention": "factorized", "depth": 4}
# Changes of the model, recompute policy, and number of graphs: one for each kind of block and function.
MEMBERS: dict[str, tuple[dict[str, Any], str, int]] = {
    "adaln_zero": ({"residual": "adaln_zero"}, "none", 1),
    "neural_rdm": ({}, "selective", 1),
    "plain": ({"residual": "plain", "base_depth": 2}, "full", 1),
    "rezero": ({"residual": "rezero"}, "none", 1),
    "layerscale": ({"residual": "layerscale"}, "every_2", 2),
    "u": ({"stacking": "u", "depth": 4}, "selective", 2),  # in the middle the skip is the stream itself
    "text": ({"condition": "text", "text": {"width": 6, "pooled_width": 5}}, "full", 1),
    "rotary": ({"positions": "rotary", "qk_norm": True}, "none", 1),
    "factorized": (CLIPS, "selective", 2),
}


def config_of(model: dict[str, Any], recompute: str = "none", **train: Any) -> RunConfig:
    small = {"input": {"channels": 4, "height": 8, "width": 8}, "hidden_size": 16, "num_heads": 2, "depth": 3}
    tree = {"model": small | {"num_classes": 4} | model, "data": {"train": "none"}, "run": {"dir": "none"}}
    return parse_config(tree | {"train": train, "parallel": {"recompute": recompute}}, "the test")


def inputs_of(config: RunConfig, size: tuple[int, int] | None = None, batch: int = 3, tokens: int = 5) -> ModelInputs:
    generator = torch.Generator().manual_seed(7)
    shape = config.model.input
    latents = torch.randn(batch, 4, shape.frames, *(size or (shape.height, shape.width)), generator=generator)
    condition: Tensor | TextCondition = torch.arange(batch) % 4
    if config.model.condition == "text":
        mask = torch.arange(tokens) < torch.arange(batch)[:, None] + 1
        words, pooled = torch.randn(batch, tokens, 6, generator=generator), torch.randn(batch, 5, generator=generator)
        condition = TextCondition(words, mask, pooled)
    return ModelInputs(latents, torch.linspace(1, 900, batch), condition)


def gradients(model: DiffusionTransformer, inputs: ModelInputs) -> list[Tensor]:
    """Loss, and the gradient of each parameter."""
    loss = model(*inputs).square().mean()
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)]


def compiled(config: RunConfig, lines: list[str] | None = None) -> tuple[DiffusionTransformer, CompiledBlocks]:
    torch._dynamo.reset()
    counters.clear()
    model = randomized(config.model)
    return model, CompiledBlocks(model.blocks.values(), config, (lines if lines is not None else []).append)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1.0, other.abs().max().item()))


@pytest.fixture
def graphs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace and count, but generate no code."""
    monkeypatch.setattr(compile, "backend", "eager")


@pytest.mark.parametrize("name", MEMBERS)
def test_each_kind_of_block_is_one_graph(name: str, graphs_only: None) -> None:
    changes, recompute, graphs = MEMBERS[name]
    config = config_of(changes, recompute)
    (model, _), inputs = compiled(config), inputs_of(config)
    expected = gradients(randomized(config.model), inputs)
    for _ in range(2):
        assert_same(gradients(model, inputs), expected)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def test_generated_code_computes_the_same() -> None:
    config = config_of({"depth": 2, "qk_norm": True}, "selective")
    (model, _), inputs = compiled(config), inputs_of(config)
    assert_same(gradients(model, inputs), gradients(randomized(config.model), inputs))


def test_shapes_beyond_the_limit_share_one_function(graphs_only: None) -> None:
    lines: list[str] = []
    config = config_of({"positions": "rotary"}, compile_shapes=2)
    plain = randomized(config.model)
    model, _ = compiled(config, lines)
    for i, (size, batch) in enumerate(
        [((8, 8), 3), ((8, 4), 3), ((12, 8), 3), ((8, 12), 4), ((16, 8), 2), ((8, 8), 3)]
    ):
        inputs = inputs_of(config, size, batch)
        assert_same(gradients(model, inputs), gradients(plain, inputs))
        assert counters["stats"]["unique_graphs"] == min(i + 1, 3)
    assert sum("shapes" in line for line in lines) == 1
    assert not counters["graph_break"]


def test_the_length_of_captions_is_a_symbol(graphs_only: None) -> None:
    config = config_of(MEMBERS["text"][0])
    plain = randomized(config.model)
    model, _ = compiled(config)
    for tokens in (5, 3, 8):
        inputs = inputs_of(config, tokens=tokens)
        assert_same(gradients(model, inputs), gradients(plain, inputs))
    assert counters["stats"]["unique_graphs"] == 1


def test_blocks_can_run_eagerly_for_a_while(graphs_only: None) -> None:
    """Hooks of submodules are then called, and the compiled graphs stay."""
    config = config_of({}, "selective")
    (model, blocks), inputs = compiled(config), inputs_of(config)
    expected = gradients(model, inputs)
    called = []
    hook = model.blocks["1"].mlp.register_forward_hook(lambda *_: called.append(1))
    with blocks.running_eagerly():
        assert_same(gradients(model, inputs), expected)
    hook.remove()
    assert called
    assert_same(gradients(model, inputs), expected)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_graph_break_is_an_error(graphs_only: None) -> None:
    config = config_of({})
    (model, _), inputs = compiled(config), inputs_of(config)
    model.blocks["0"].mlp.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(*inputs)


def test_auto_compiles_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu, lines = torch.device("cpu"), torch.device("cuda"), []
    choices = {
        choice: wants_compilation(config_of({}, compile=choice), cpu, lines.append) for choice in ("auto", True, False)
    }
    assert choices == {"auto": False, True: True, False: False}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not wants_compilation(config_of({}), gpu, lines.append)
    assert "triton" in lines[-1]
    with pytest.raises(ConfigError, match="triton"):
        wants_compilation(config_of({}, compile=True), gpu, lines.append)


def kept_bytes(recompute: str) -> int:
    """Bytes that a forward allocates and keeps for its backward, of compiled blocks."""
    config = config_of({"hidden_size": 64, "num_heads": 4, "depth": 4}, recompute)
    (model, _), inputs = compiled(config), inputs_of(config, (16, 16), batch=4)
    gradients(model, inputs)  # compiles
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        loss = model(*inputs).square().mean()
    del loss
    return sum(event.self_cpu_memory_usage for event in recorded.events())


def test_policies_save_memory_when_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "backend", "aot_eager")  # divides forward from backward as the default backend does
    kept = {policy: kept_bytes(policy) for policy in ("none", "every_2", "selective", "full")}
    assert kept["selective"] <= 0.7 * kept["none"], kept
    assert kept["full"] < kept["every_2"] < kept["none"] and kept["full"] < kept["selective"], kept
