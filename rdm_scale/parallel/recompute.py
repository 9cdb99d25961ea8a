"""Activation recompute: blocks that keep little of their forward and run it again in the backward.

`full` keeps a block's input only, `every_N` does so for every N-th block and keeps all of the others, `selective` keeps
the outputs of matrix products and of attention, which are dear to compute, and recomputes the rest (norms, modulation,
GELU), which is cheap and makes up most of what is stored (Korthikanti et al. 2022, arXiv 2205.05198, section 5).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from rdm_scale.models.blocks import DotProductAttention
from rdm_scale.models.layers import Linear
from rdm_scale.parallel.megatron_adapter import Column, Row

_PRODUCTS = (Linear, Column, Row, DotProductAttention)
_aten = torch.ops.aten
_KEPT = {
    _aten.addmm.default,  # what models.layers.Linear runs, and why it does
    _aten.mm.default,  # layers without a bias, and megatron-core's
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def recompute_blocks(blocks: Iterable[nn.Module], policy: str) -> None:
    """Makes blocks recompute their activations as `parallel.recompute` says.

    The forward inside the module is wrapped, not the module: hooks around it, such as ZeRO's that gather a block's
    parameters before its forward and before its backward, then run once each.
    """
    if policy == "none":
        return
    every = int(policy.removeprefix("every_")) if policy.startswith("every_") else 1
    for block in islice(blocks, 0, None, every):
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # blocks draw no random numbers
        if policy == "selective":
            options["context_fn"] = _KeptProducts(block).contexts
        block.forward = partial(checkpoint, block.forward, **options)


class _KeptProducts:
    """Lets torch keep the products of a block, or hand them out again, in each call of the modules that make them.

    It looks at every operation meanwhile, which for all of a block's would take longer than to compute them again.
    """

    def __init__(self, block: nn.Module) -> None:
        self._mode: Callable[[], Any] = nullcontext  # makes that of the next call
        for module in block.modules():
            if isinstance(module, _PRODUCTS):
                module.forward = partial(self._run, module.forward)  # type: ignore[method-assign]

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For a forward and its recomputation."""
        kept: list[Any] = []  # by each call in turn

        def keep() -> Any:
            keeping, handing_out = create_selective_checkpoint_contexts(_keep_products)
            kept.append(handing_out)
            return keeping

        return self._using(keep), self._using(iter(kept).__next__)

    @contextmanager
    def _using(self, mode: Callable[[], Any]) -> Iterator[None]:
        self._mode, before = mode, self._mode
        try:
            yield
        finally:
            self._mode = before

    def _run(self, forward: Callable[..., Tensor], *inputs: Any) -> Tensor:
        with self._mode():
            return forward(*inputs)


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
