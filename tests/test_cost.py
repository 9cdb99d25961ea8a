"""Parameters, FLOPs and bytes, compared with models that are built and with published figures."""

import gc
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rdm_scale import cost
from rdm_scale.conditions import TextCondition
from rdm_scale.config import GateConfig, InputConfig, ModelConfig, RunConfig, TextConfig, parse_config
from rdm_scale.models import build_model
from rdm_scale.parallel.recompute import checkpoint_activations

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
def test_parameters_equal_those_of_the_model(changes: dict) -> None:
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
    multiplication and an addition as one).
    """
    model = ModelConfig(hidden_size=1152, depth=28, num_heads=16, residual="adaln_zero", learned_variance=True)
    assert cost.model_parameters(model).total == pytest.approx(675e6, rel=0.002)
    assert cost.model_flops(model) / 2 == pytest.approx(118.6e9, rel=0.01)


def test_flops_of_a_sample_of_another_size() -> None:
    """As many as those of a model that is configured for that size."""
    size = InputConfig(frames=4, height=8, width=24)
    other = small(input=size, attention="factorized", depth=2)
    assert cost.model_flops(small(attention="factorized", depth=2), (4, 8, 24)) == cost.model_flops(other)


@pytest.mark.parametrize(("policy", "blocks"), [("none", 0), ("selective", 0), ("full", 3), ("every_2", 2)])
def test_recomputation_repeats_the_forwards_of_blocks(policy: str, blocks: int) -> None:
    config = run(small(), parallel={"recompute": policy})
    assert cost.recomputed_flops(config) == blocks * cost.block_flops(config.model)


def test_factorized_attention_costs_as_many_keys_as_a_token_has() -> None:
    """4 frames of 16 tokens: full attention takes 4 S S D, spatial 4 S 16 D, temporal 4 S 4 D."""
    size, S, D = InputConfig(frames=4, height=8, width=8), 64, 64
    joint, factorized = (small(attention=kind, depth=2, input=size) for kind in ("joint", "factorized"))
    assert cost.block_flops(joint) - cost.block_flops(factorized, 0) == 4 * S * (S - 16) * D
    assert cost.block_flops(joint) - cost.block_flops(factorized, 1) == 4 * S * (S - 4) * D
    assert cost.blocks_flops(factorized, range(2)) == 2 * cost.block_flops(joint) - 4 * S * (2 * S - 20) * D


def test_tensor_parallelism_shards_all_but_vectors_and_embeddings() -> None:
    model = small()
    counted = cost.block_parameters(model)
    assert counted.on_rank(4) == counted.sharded // 4 + counted.replicated
    assert counted.replicated == 6 * 64  # two biases, two gates of two vectors
    assert cost.embedding_parameters(model).sharded == 0


# Largest relative error: `none` and `selective` leave out tensors of B D elements and a caption's keys and values.
ERRORS = {"none": 0.06, "selective": 0.035, "full": 0.0}


@pytest.mark.parametrize("policy", ERRORS)
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
def test_activation_bytes_are_those_that_autograd_keeps(policy: str, precision: str, changes: dict) -> None:
    """The last block of a model; in a u stack it has a long skip."""
    config = run(small(**({"depth": 1} | changes)), train={"precision": precision}, parallel={"recompute": policy})
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    number = config.model.depth - 1
    model = build_model(config.model)
    block = model.blocks[str(number)].to(dtype)
    checkpoint_activations([block], policy)
    S, B, D = config.model.tokens, 16, config.model.hidden_size
    z = torch.randn(S, B, D, requires_grad=True)
    text = TextCondition.from_captions([(torch.randn(3, TEXT.width), torch.randn(TEXT.pooled_width))] * B)
    embedding = torch.randn(B, D, dtype=dtype, requires_grad=True)
    given: list[Any] = [z, model.conditioning(embedding, config.model.grid, text)]
    if number:
        given.append(torch.randn(S, B, D, requires_grad=True))  # the output of another block, which holds it
    kept = bytes_kept(lambda: block(*given)) + z.untyped_storage().nbytes()
    assert kept == pytest.approx(cost.block_activation_bytes(config, B, policy, number), rel=ERRORS[policy])


class Allocations(TorchDispatchMode):
    """Bytes of each storage that an operation allocates, by weak reference to the storage."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        shared = storages((args, kwargs))  # by views and in-place operations
        self.bytes |= {StorageWeakRef(s): s.nbytes() for s in storages(result).values() if s.data_ptr() not in shared}
        return result


def storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    """Storages of all tensors in a tree of containers, by address."""
    found = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return {storage.data_ptr(): storage for storage in found}


def bytes_kept(forward: Callable[[], torch.Tensor]) -> int:
    """Bytes that a forward allocates and that the graph of its output keeps alive, without the output itself."""
    with Allocations() as allocations:
        output = forward()
    gc.collect()  # what only reference cycles hold is not kept
    own = StorageWeakRef(output.untyped_storage())
    return sum(size for ref, size in allocations.bytes.items() if ref != own and not ref.expired())


def test_every_2_recomputes_every_second_block() -> None:
    config = run(small(depth=5), parallel={"recompute": "every_2"})
    none, full = (cost.block_activation_bytes(config, 4, policy) for policy in ("none", "full"))
    assert cost.blocks_activation_bytes(config, 4, range(5)) == 2 * none + 3 * full  # blocks 0, 2 and 4 are recomputed


@pytest.mark.parametrize(
    ("stage", "expected"),
    # n = 1000 parameters on 4 ranks in bf16: parameters 2 n, gradients 4 n, optimizer 12 n, EMA 4 n
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
    assert (state.parameters, state.gradients, state.optimizer, state.ema) == expected
    assert state.total == sum(expected)


def test_keep_gathered_holds_shards_and_unsharded_parameters() -> None:
    state = cost.state_bytes(run(small()), 1000, 4, keep_gathered=True)
    assert (state.parameters, state.gradients) == (5000, 5000)


def test_importing_it_loads_no_library() -> None:
    code = "import sys, rdm_scale.cost; assert not {'torch', 'deepspeed', 'megatron'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
