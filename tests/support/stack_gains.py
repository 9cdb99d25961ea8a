"""Forward and backward gains of a freshly initialized stack of blocks."""

import torch

from rdm_scale.config import InputConfig, ModelConfig
from rdm_scale.models import build_model


def small_stack(depth: int, **changes: object) -> ModelConfig:
    """Configuration of a class-conditional model of width 64 with 16 tokens."""
    base = {"input": InputConfig(height=8, width=8), "hidden_size": 64, "num_heads": 4, "num_classes": 10}
    return ModelConfig(**{**base, "depth": depth, **changes})


def stack_gains(config: ModelConfig, seed: int = 0) -> tuple[float, float]:
    """Gain of the variance of hidden states, and of the squared norm of a cotangent, through all blocks.

    Returns:
        The variance after the last block over that before the first; and the squared norm of a random cotangent pulled
        back through the blocks over its own.
    """
    model = build_model(config, seed)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(8, 4, 1, 8, 8, generator=generator)
    z, conditioning = model.embed(latents, torch.rand(8, generator=generator) * 1000, torch.arange(8))
    first = z.detach().requires_grad_()
    last = model.run_blocks(range(config.depth), first, conditioning)
    cotangent = torch.randn(last.shape, generator=generator)
    (pulled,) = torch.autograd.grad(last, first, cotangent)
    return (last.var() / first.var()).item(), (pulled.square().sum() / cotangent.square().sum()).item()
