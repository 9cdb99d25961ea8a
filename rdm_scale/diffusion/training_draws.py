"""Timestep, noise and condition dropout of each training sample, drawn by key."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rdm_scale import rng
from rdm_scale.batch import LatentBatch, TrainingBatch
from rdm_scale.conditions import Condition, TextCondition, replace_captions
from rdm_scale.diffusion.objectives import Objective
from rdm_scale.errors import DataError


def draw(
    batch: LatentBatch,
    *,
    objective: Objective,
    seed: int,
    num_classes: int | None,
    condition_dropout: float,
    empty_caption: TextCondition | None = None,
    purpose: str = "train",
) -> TrainingBatch:
    """Draw timestep, noise and condition dropout of each sample, as functions of (seed, purpose, position) alone.

    Args:
        num_classes: number of classes, which is also the null label: it replaces a label that is dropped or missing.
            None for a model without classes.
        condition_dropout: probability with which a label or caption is dropped (classifier-free guidance, Ho & Salimans
            2022).
        empty_caption: replacement for a dropped caption; None for a model without text.

    Raises:
        DataError: a label that is not below num_classes.
    """
    positions = batch.positions.tolist()
    shape = batch.latents.shape[1:]

    def generators(quantity: str) -> Iterator[torch.Generator]:
        return (rng.generator(seed, f"{purpose} {quantity}", position) for position in positions)

    def dropped() -> Tensor:
        uniform = torch.stack([torch.rand((), generator=g) for g in generators("condition dropout")])
        return uniform < condition_dropout

    condition: Condition = None
    if num_classes is not None:
        _check_labels(batch, num_classes)
        condition = batch.labels.masked_fill(dropped() | (batch.labels < 0), num_classes)
    if empty_caption is not None:
        assert batch.text is not None, "the stream must read captions"
        condition = replace_captions(batch.text, dropped(), empty_caption)
    return TrainingBatch(
        step=batch.step,
        positions=batch.positions,
        ids=batch.ids,
        latents=batch.latents,
        noise=torch.stack([torch.randn(shape, generator=g) for g in generators("noise")]),
        t=torch.tensor([objective.draw_timestep(g) for g in generators("timestep")], dtype=torch.float32),
        condition=condition,
    )


def _check_labels(batch: LatentBatch, num_classes: int) -> None:
    unknown = batch.labels >= num_classes
    if unknown.any():
        raise DataError(
            f"the sample with id {batch.ids[unknown][0].item()} has label {batch.labels[unknown][0].item()}, "
            f"and model.num_classes={num_classes}: set model.num_classes to the number of classes of the data"
        )
