"""Diffusion transformers in plain PyTorch, without knowledge of ranks."""

from rdm_scale.models.transformer import DiffusionTransformer, ModelPart, build_model
from rdm_scale.moved import moved_names

__all__ = ["DiffusionTransformer", "ModelPart", "build_model"]

__getattr__ = moved_names(__name__)
