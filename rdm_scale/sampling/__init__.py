"""Sampling from trained models: drawing latents and pixels, image grids, and a diffusers-style pipeline."""

from typing import TYPE_CHECKING

from rdm_scale.lazy import lazy_names

if TYPE_CHECKING:
    from rdm_scale.sampling.rdm_pipeline import RDMPipeline

__all__ = ["RDMPipeline"]

__getattr__ = lazy_names(__name__, {"rdm_pipeline": ("RDMPipeline",)})  # drawing needs none of its imports
