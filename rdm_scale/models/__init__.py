"""Plain PyTorch models: they know nothing of ranks."""

from rdm_scale.models.transformer import DiffusionTransformer, build_model

__all__ = ["DiffusionTransformer", "build_model"]
