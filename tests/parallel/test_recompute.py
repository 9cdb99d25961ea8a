"""Activation checkpointing: the same gradients, less memory, and only selected operations recomputed."""

import gc
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from rdm_scale.config import InputConfig, ModelConfig
from rdm_scale.models import DiffusionTransformer, build_model
from rdm_scale.parallel.recompute import checkpoint_activations

DEPTH = 6
CONFIG = ModelConfig(input=InputConfig(height=16, width=16), hidden_size=64, num_heads=4, depth=DEPTH, num_classes=10)
LATENTS = torch.randn(4, 4, 1, 16, 16, generator=torch.Generator().manual_seed(0))


class CountCalls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def model_with(policy: str) -> DiffusionTransformer:
    model = build_model(CONFIG)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # no zeros, so that every path has a gradient
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    checkpoint_activations(model.blocks.values(), policy)
    return model


def forward(model: DiffusionTransformer) -> Tensor:
    return model(LATENTS, torch.tensor([1.0, 200.0, 500.0, 900.0]), torch.tensor([0, 3, 9, 10])).square().mean()


@pytest.mark.parametrize("policy", ["full", "selective", "every_2", "every_5"])
def test_gradients_equal_those_without_checkpointing(policy: str) -> None:
    plain, other = model_with("none"), model_with(policy)
    forward(plain).backward()
    forward(other).backward()
    for (name, a), b in zip(plain.named_parameters(), other.parameters(), strict=True):
        assert a.grad is not None and a.grad.abs().max() > 0, name
        assert torch.equal(a.grad, b.grad), name  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("policy", "blocks", "products"),
    [("none", 0, False), ("full", 6, True), ("selective", 6, False), ("every_2", 3, True), ("every_5", 2, True)],
)
def test_only_selected_operations_are_recomputed(policy: str, blocks: int, products: bool) -> None:
    """Counted by GELU and attention, of which a block has one each."""
    loss = forward(model_with(policy))
    with CountCalls() as counter:
        loss.backward()
    assert counter.calls["gelu"] == blocks
    assert counter.calls["_scaled_dot_product_flash_attention_for_cpu"] == (blocks if products else 0)


def kept_bytes(policy: str) -> int:
    """Bytes that are allocated in the forward and still alive at its end."""
    model = model_with(policy)
    gc.collect()  # of models before, whose memory would otherwise be freed at any time within the profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        loss = forward(model)
    del loss
    return sum(event.self_cpu_memory_usage for event in recorded.events())


def test_policies_are_ordered_by_memory() -> None:
    kept = {policy: kept_bytes(policy) for policy in ("none", "every_2", "selective", "full")}
    stream = 64 * 4 * 64 * 4  # a block's input: tokens x batch x width in fp32, all that full keeps of it
    assert kept["full"] < kept["selective"] < kept["none"] and kept["full"] < kept["every_2"] < kept["none"]
    assert kept["full"] < 3 * DEPTH * stream, kept
