"""Diffusion objectives, noise schedules and samplers; independent of the model.

An objective defines what the model learns (`build_objective`), `training_draws` draws timesteps and noise by key, and
`sample` draws samples from a trained model.
"""

from rdm_scale.diffusion.noise_schedule import NoiseSchedule
from rdm_scale.diffusion.objectives import DdpmObjective, FlowObjective, Objective, build_objective
from rdm_scale.diffusion.samplers import SAMPLERS, sample

__all__ = [
    "SAMPLERS",
    "DdpmObjective",
    "FlowObjective",
    "NoiseSchedule",
    "Objective",
    "build_objective",
    "sample",
]
