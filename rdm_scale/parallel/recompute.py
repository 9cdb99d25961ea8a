"""Activation recompute: blocks that keep little of their forward and run it again in the backward.

`full` keeps a block's input only, `every_N` does so for every N-th block and keeps all of the others, `selective` keeps
the outputs of matrix products and of attention, which are dear to compute, and recomputes the rest (norms, modulation,
GELU), which is cheap and makes up most of what is stored (Korthikanti et al. 2022, arXiv 2205.05198, section 5).
"""

from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

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
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # blocks draw no random numbers
    if policy == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    for block in islice(blocks, 0, None, every):
        block.forward = partial(checkpoint, block.forward, **options)


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
