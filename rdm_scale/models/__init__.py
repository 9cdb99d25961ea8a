"""Plain PyTorch models: they know nothing of ranks."""

from rdm_scale.models.transformer import DiffusionTransformer, Part, build_model

__all__ = ["DiffusionTransformer", "Part", "build_model"]
