"""Counts against models that are built, and against published figures."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rdm_scale import cost
from rdm_scale.conditions import TextCondition
from rdm_scale.config import GateConfig, InputConfig, ModelConfig, RunConfig, TextConfig, parse_config
from rdm_scale.models import build_model
from rdm_scale.parallel.recompute import recompute_blocks

TEXT = TextConfig(width=8, pooled_width=4)


def small(**changes: object) -> ModelConfig:
    size = InputConfig(height=16, width=16)
    return ModelConfig(**{"input": size, "hidden_size": 64, "num_heads": 4, "depth": 3, "num_classes": 10} | changes)


def run(model: ModelConfig, **sections: dict[str, object]) -> RunConfig:
    tree = {"model": model.model_dump(mode="json"), "data": {"train": "x"}, "run": {"dir": "x"}} | sections
    return parse_config(tree, "the test")


@pytest.mark.parametrize(
    "changes",
    [
        {"residual": "plain"},
        {"residual": "rezero"},
        {"residual": "layerscale"},
        {"residual": "adaln_zero", "condition": "none"},
        {"residual": "neural_rdm", "mlp_ratio": 3.0},
        {"gate": GateConfig(conditional=False, per_channel=False)},
        {"input": InputConfig(frames=4, height=8, width=16), "patch_size": (2, 2, 4)},
        {"stacking": "u"},
        {"condition": "text", "text": TextConfig(width=24, pooled_width=12), "qk_norm": True},
        {"qk_norm": True, "positions": "rotary"},
        {"attention": "factorized", "depth": 4, "input": InputConfig(frames=4, height=8, width=8)},
    ],
)
def test_parameters_are_those_of_the_model(changes: dict) -> None:
    with torch.device("meta"):
        model = build_model(small(**changes))
    config = model.config
    counted = cost.model_parameters(config)
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.tensors == len(list(model.parameters()))
    for i, block in model.blocks.items():
        assert cost.block_parameters(config, int(i)).total == sum(p.numel() for p in block.parameters())


def test_dit_xl_has_its_published_size_and_cost() -> None:
    """DiT-XL/2: 675 M parameters and 118.6 Gflop a sample at 256 px (arXiv 2212.09748, table 4, which counts a
    multiplication and an addition as one)."""
    model = ModelConfig(hidden_size=1152, depth=28, num_heads=16, residual="adaln_zero", learned_variance=True)
    assert cost.model_parameters(model).total == pytest.approx(675e6, rel=0.002)
    assert cost.model_flops(model) / 2 == pytest.approx(118.6e9, rel=0.01)


def test_factorized_attention_costs_what_its_tokens_see() -> None:
    """4 frames of 16 tokens: joint attention is 4 S S D, in space 4 S 16 D, along time 4 S 4 D."""
    size, S, D = InputConfig(frames=4, height=8, width=8), 64, 64
    joint, factorized = (small(attention=kind, depth=2, input=size) for kind in ("joint", "factorized"))
    assert cost.block_flops(joint) - cost.block_flops(factorized, 0) == 4 * S * (S - 16) * D
    assert cost.block_flops(joint) - cost.block_flops(factorized, 1) == 4 * S * (S - 4) * D
    assert cost.blocks_flops(factorized, range(2)) == 2 * cost.block_flops(joint) - 4 * S * (2 * S - 20) * D


def test_tensor_parallelism_cuts_all_but_vectors_and_embeddings() -> None:
    model = small()
    counted = cost.block_parameters(model)
    assert counted.on_rank(4) == counted.cut // 4 + counted.whole
    assert counted.whole == 6 * 64  # two biases, two gates of two vectors
    assert cost.embedding_parameters(model).cut == 0


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"depth": 2, "stacking": "u"},
        {"condition": "text", "text": TEXT},
        {"positions": "rotary"},
        {"qk_norm": True},
    ],
    ids=str,
)
def test_activations_are_what_autograd_keeps(policy: str, precision: str, changes: dict) -> None:
    """Of the last block: of a u stack it has a long skip."""
    config = run(small(**({"depth": 1} | changes)), train={"precision": precision}, parallel={"recompute": policy})
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    number = config.model.depth - 1
    model = build_model(config.model)
    block = model.blocks[str(number)].to(dtype)
    recompute_blocks([block], policy)
    S, B, D = config.model.tokens, 16, config.model.hidden_size
    z = torch.randn(S, B, D, requires_grad=True)
    text = TextCondition.from_captions([(torch.randn(3, TEXT.width), torch.randn(TEXT.pooled_width))] * B)
    embedding = torch.randn(B, D, dtype=dtype, requires_grad=True)
    conditioning = model.conditioning(embedding, config.model.grid, text)
    given: list[Any] = [z, conditioning]
    if number:
        given.append(torch.randn(S, B, D, requires_grad=True))
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = block(*given)
    kept.pop(given[-1].untyped_storage().data_ptr() if number else 0, None)  # the skip is another block's output
    measured = sum(kept.values())
    if policy != "none":  # what checkpoint keeps lies outside autograd's saved tensors
        measured = allocated_by(lambda: block(*given)) - out.untyped_storage().nbytes() + z.untyped_storage().nbytes()
    assert measured == pytest.approx(cost.block_activation_bytes(config, B, policy, number), rel=0.06)


def allocated_by(forward: object) -> int:
    """Bytes allocated in a forward and alive after it, its output with them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = forward()  # type: ignore[operator]
    del kept
    return sum(event.self_cpu_memory_usage for event in recorded.events())


def test_every_second_block_keeps_its_activations() -> None:
    config = run(small(depth=5), parallel={"recompute": "every_2"})
    none, full = (cost.block_activation_bytes(config, 4, policy) for policy in ("none", "full"))
    assert cost.blocks_activation_bytes(config, 4, range(5)) == 2 * none + 3 * full  # blocks 0, 2 and 4 are recomputed


@pytest.mark.parametrize(
    ("stage", "expected"),
    # n = 1000 parameters on 4 ranks in bf16: parameters 2 n, gradients 4 n, masters and moments 12 n, average 4 n
    [
        (0, (2000, 4000, 12000, 4000)),
        (1, (2000, 4000, 3000, 1000)),
        (2, (2000, 1000, 3000, 1000)),
        (3, (500, 1000, 3000, 1000)),
    ],
)
def test_each_stage_shards_more(stage: int, expected: tuple[int, ...]) -> None:
    config = run(small(), train={"precision": "bf16"}, parallel={"zero_stage": stage})
    state = cost.state_bytes(config, 1000, 4, keep_gathered=False)
    assert (state.parameters, state.gradients, state.optimizer, state.average) == expected
    assert state.total == sum(expected)


def test_kept_gathered_holds_both() -> None:
    state = cost.state_bytes(run(small()), 1000, 4, keep_gathered=True)
    assert (state.parameters, state.gradients) == (5000, 5000)


def test_no_library_is_needed(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys, rdm_scale.cost; assert not {'torch', 'deepspeed', 'megatron'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
