"""Loss of a model on held-out samples, computed as a run computes it."""

import torch
from torch import Tensor, nn

from rdm_scale.batch import TrainingBatch
from rdm_scale.config import RunConfig
from rdm_scale.data.held_out import HeldOut
from rdm_scale.diffusion import Objective, build_objective
from rdm_scale.diffusion.training_draws import draw


def validation_loss(model: nn.Module, config: RunConfig, samples: int) -> float:
    """Mean loss over `samples` held-out samples, with the timestep and noise that belong to each sample."""
    objective = build_objective(config.diffusion, config.model.learned_variance)
    held_out = HeldOut(config.data.validation, samples, batch_size=64, dp_rank=0, dp_size=1, config=config.data)
    total = torch.zeros(2, dtype=torch.float64)  # weighted losses, weights
    with torch.no_grad():
        for latents, weight_B in held_out:
            batch = draw(
                latents,
                objective=objective,
                seed=0,
                num_classes=config.model.num_classes,
                condition_dropout=0.0,
                purpose="validation",
            )
            loss_B = sample_losses(model, objective, batch)
            total += torch.stack([(loss_B.double() * weight_B).sum(), weight_B.sum()])
    return (total[0] / total[1]).item()


def sample_losses(model: nn.Module, objective: Objective, batch: TrainingBatch) -> Tensor:
    """Loss [B] of each sample of a batch."""
    return objective.sample_losses(model(*objective.model_inputs(batch)), batch)
