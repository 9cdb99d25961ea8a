"""Models away from their initial values, where zero-initialized gates would hide most of the function."""

import torch

from rdm_scale.config import ModelConfig
from rdm_scale.models import DiffusionTransformer, build_model


def randomized(config: ModelConfig, scale: float = 0.1) -> DiffusionTransformer:
    """Build a model and add noise of this scale to every parameter, so that every path influences the output."""
    model = build_model(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model
