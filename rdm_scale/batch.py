"""Batches of latents, as the data stream reads them and as a training step takes them."""

from dataclasses import dataclass, fields
from typing import NamedTuple, Self

import torch
from torch import Tensor

from rdm_scale.conditions import Condition, TextCondition


class ModelInputs(NamedTuple):
    """Arguments of a model's forward: noised latents [B, C, T, H, W], timesteps [B] and condition."""

    latents: Tensor
    timesteps: Tensor
    condition: Condition = None


@dataclass(frozen=True)
class LatentBatch:
    """One rank's samples of a step, all of one dataset and one shape, normalized to unit scale.

    positions, ids and labels int64 [B] (label -1: unlabelled); latents float32 [B, C, T, H, W].
    """

    step: int
    positions: Tensor
    ids: Tensor
    labels: Tensor
    latents: Tensor
    text: TextCondition | None = None


@dataclass(frozen=True)
class TrainingBatch:
    """One rank's samples of a step with everything that is random about them.

    positions and ids int64 [B]; latents (x_0) and noise float32 [B, C, T, H, W]; t float32 [B], in the objective's
    units; condition int64 [B], or None for a model without classes; text_tokens float32 [B, N, D], text_mask bool
    [B, N] and text_pooled float32 [B, P] of captions, or None for a model without text; weights float64 [B] of the
    samples in a validation loss, None in training.
    """

    step: int
    positions: Tensor
    ids: Tensor
    latents: Tensor
    noise: Tensor
    t: Tensor
    condition: Tensor | None = None
    text_tokens: Tensor | None = None
    text_mask: Tensor | None = None
    text_pooled: Tensor | None = None
    weights: Tensor | None = None

    @property
    def model_condition(self) -> Condition:
        """Condition in the form that the model takes."""
        if self.text_tokens is None or self.text_mask is None or self.text_pooled is None:
            return self.condition
        return TextCondition(self.text_tokens, self.text_mask, self.text_pooled)

    def __len__(self) -> int:
        return len(self.positions)

    def split(self, micro_batch_size: int) -> "list[TrainingBatch]":
        """Split into micro-batches, in order; the last one may be smaller."""
        parts = {name: value.split(micro_batch_size) for name, value in self.tensors().items()}
        number = len(parts["positions"])
        return [self.from_tensors(self.step, {name: value[i] for name, value in parts.items()}) for i in range(number)]

    def to(self, device: torch.device | str) -> "TrainingBatch":
        return self.from_tensors(self.step, {name: value.to(device) for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Fields that hold a tensor, by name."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in values if isinstance(value, Tensor)}

    @classmethod
    def from_tensors(cls, step: int, tensors: dict[str, Tensor]) -> Self:
        """Inverse of `tensors`."""
        return cls(step=step, **tensors)
