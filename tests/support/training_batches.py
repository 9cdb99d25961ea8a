"""Training batches of known content, drawn by the real functions."""

import torch

from rdm_scale.batch import LatentBatch, TrainingBatch
from rdm_scale.config import DiffusionConfig
from rdm_scale.diffusion import Objective, build_objective
from rdm_scale.diffusion.training_draws import draw

FLOW = build_objective(DiffusionConfig(), False)
DDPM = build_objective(DiffusionConfig(objective="ddpm"), False)


def latent_batch(positions: range, labels: torch.Tensor | None = None) -> LatentBatch:
    size = len(positions)
    return LatentBatch(
        step=4,
        positions=torch.tensor(positions),
        ids=torch.tensor(positions) + 1000,
        labels=torch.zeros(size, dtype=torch.int64) if labels is None else labels,
        latents=torch.ones(size, 2, 1, 3, 4),
    )


def drawn_batch(
    batch: LatentBatch, seed: int = 1, purpose: str = "train", objective: Objective = FLOW
) -> TrainingBatch:
    return draw(batch, objective=objective, seed=seed, num_classes=10, condition_dropout=0.3, purpose=purpose)


def assert_training_batches_equal(one: TrainingBatch, other: TrainingBatch) -> None:
    assert one.step == other.step
    for name in ("positions", "ids", "latents", "noise", "t", "condition"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
