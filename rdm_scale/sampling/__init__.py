"""Sampling from trained models: drawing latents and pixels, image grids, and a diffusers-style pipeline."""

from typing import Any

__all__ = ["RDMPipeline"]


def __getattr__(name: str) -> Any:
    # On demand: drawing needs none of what the pipeline imports.
    if name == "RDMPipeline":
        from rdm_scale.sampling.rdm_pipeline import RDMPipeline

        return RDMPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
