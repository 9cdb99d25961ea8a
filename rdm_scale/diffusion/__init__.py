"""Objectives (what the model learns) and samplers (how samples are drawn from it); knows no model."""

from rdm_scale.diffusion.objectives import Objective, build_objective
from rdm_scale.diffusion.samplers import sample

__all__ = ["Objective", "build_objective", "sample"]
