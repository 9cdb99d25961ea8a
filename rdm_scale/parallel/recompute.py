"""Activation checkpointing (`parallel.recompute`): few activations kept, the others recomputed in the backward.

`full` keeps the input of a block only, `every_N` does so for every N-th block and keeps all activations of the others,
`selective` keeps the outputs of matrix products and of attention, which are expensive to compute, and recomputes the
rest (norms, modulation, GELU), which is cheap and makes up most of the memory (Korthikanti et al. 2022, arXiv
2205.05198, section 5).

A policy chooses a function for each block. Hooks around a block, such as those of ZeRO that all-gather its parameters
before its forward and before its backward, then run once each. The functions can be compiled, checkpointing included:
the compiled backward leaves out what it does not need of the forward, such as the last product of a block.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from rdm_scale.models.blocks import Block, BlockFunction, Conditioning, DotProductAttention
from rdm_scale.models.layers import Linear
from rdm_scale.parallel import tensor_operators as operators
from rdm_scale.parallel.megatron_adapter import Column, Row

_PRODUCTS = (Linear, Column, Row, DotProductAttention)
_aten = torch.ops.aten
_KEPT = {
    _aten.addmm.default,  # what models.layers.Linear runs, and why it does
    _aten.mm.default,  # layers without a bias
    operators.column,
    operators.row,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


Context = AbstractContextManager[None]


def block_function(policy: str, position: int) -> BlockFunction:
    """Function of the block at `position` among a rank's blocks, as `policy` (a value of `parallel.recompute`) says."""
    every = int(policy.removeprefix("every_")) if policy.startswith("every_") else 1
    if policy == "none" or position % every:
        return Block.run
    return run_selective if policy == "selective" else run_full


def checkpoint_activations(blocks: Iterable[nn.Module], policy: str) -> None:
    """Checkpoint the activations of a rank's blocks, which are not compiled."""
    for position, block in enumerate(blocks):
        assert isinstance(block, Block)
        block.function = SelectiveCheckpointing(block) if policy == "selective" else block_function(policy, position)


def run_full(block: Block, z_SBD: Tensor, conditioning: Conditioning, skip_SBD: Tensor | None = None) -> Tensor:
    """Run a block of which only the inputs are kept."""
    # Blocks draw no random numbers.
    return checkpoint(Block.run, block, z_SBD, conditioning, skip_SBD, use_reentrant=False, preserve_rng_state=False)


def run_selective(block: Block, z_SBD: Tensor, conditioning: Conditioning, skip_SBD: Tensor | None = None) -> Tensor:
    """Run a block of which inputs and products are kept; slow where it is not compiled, see SelectiveCheckpointing."""
    inputs = (block, z_SBD, conditioning, skip_SBD)
    return checkpoint(Block.run, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=_keeping_products)


class SelectiveCheckpointing:
    """Runs the forward of one block, of which inputs and products are kept.

    torch's selective checkpointing looks at every operation, which for all operations of a block would take longer than
    to recompute them. So it is active only within the modules that compute products, which enter it by hooks.
    """

    def __init__(self, block: Block) -> None:
        self._mode: Callable[[], Context] = nullcontext  # makes the context of the next call of a product
        self._entered: list[Context] = []
        for module in block.modules():
            if isinstance(module, _PRODUCTS):
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._exit, always_call=True)

    def __call__(self, *inputs: Any) -> Tensor:
        return checkpoint(
            Block.run,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=self._forward_and_recomputation,
        )

    def _forward_and_recomputation(self) -> tuple[Context, Context]:
        """Contexts of a forward and of its recomputation."""
        recomputations: list[Context] = []  # of each call of a product, in order

        def keep() -> Context:
            forward, recomputation = _keeping_products()
            recomputations.append(recomputation)
            return forward

        return self._using(keep), self._using(iter(recomputations).__next__)

    @contextmanager
    def _using(self, mode: Callable[[], Context]) -> Iterator[None]:
        self._mode, before = mode, self._mode
        try:
            yield
        finally:
            self._mode = before

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        context = self._mode()
        context.__enter__()
        self._entered.append(context)

    def _exit(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._entered.pop().__exit__(None, None, None)


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


_keeping_products = partial(create_selective_checkpoint_contexts, _keep_products)
