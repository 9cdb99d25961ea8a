"""Batches of latents, as the data stream reads them and as a training step takes them."""

from dataclasses import dataclass, fields
from typing import NamedTuple, Self

import torch
from torch import Tensor

from rdm_scale.conditions import Condition, TextCondition

_CAPTIONS = "condition."  # prefix of the tensors of a TextCondition


class ModelInputs(NamedTuple):
    """Arguments of a model's forward: noised latents [B, C, T, H, W], timesteps [B] and condition."""

    latents: Tensor
    timesteps: Tensor
    condition: Condition = None


@dataclass(frozen=True)
class LatentBatch:
    """One rank's samples of a step, all of one dataset and one shape, normalized to unit scale.

    positions, ids and labels int64 [B] (label -1: no label); latents float32 [B, C, T, H, W].
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
    units; condition as the model takes it; weights float64 [B] of the samples in a validation loss, None in training.
    """

    step: int
    positions: Tensor
    ids: Tensor
    latents: Tensor
    noise: Tensor
    t: Tensor
    condition: Condition = None
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.positions)

    def split(self, micro_batch_size: int) -> "list[TrainingBatch]":
        """Split into micro-batches, in order; the last one may be smaller."""
        parts = {name: value.split(micro_batch_size) for name, value in self.tensors().items()}
        number = len(parts["positions"])
        return [self.from_tensors(self.step, {name: value[i] for name, value in parts.items()}) for i in range(number)]

    def to(self, device: torch.device | str) -> "TrainingBatch":
        """Copy on a device; from page-locked memory (`pinned`) a GPU copies it without the host waiting."""
        return self.from_tensors(
            self.step,
            {name: value.to(device, non_blocking=value.is_pinned()) for name, value in self.tensors().items()},
        )

    def pinned(self) -> "TrainingBatch":
        """Copy in page-locked memory of the host."""
        return self.from_tensors(self.step, {name: value.pin_memory() for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; those of a TextCondition as `condition.tokens` and so on."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if isinstance(self.condition, TextCondition):
            values |= {_CAPTIONS + name: part for name, part in self.condition._asdict().items()}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @classmethod
    def from_tensors(cls, step: int, tensors: dict[str, Tensor]) -> Self:
        """Inverse of `tensors`."""
        captions = {name.removeprefix(_CAPTIONS): part for name, part in tensors.items() if name.startswith(_CAPTIONS)}
        others = {name: value for name, value in tensors.items() if not name.startswith(_CAPTIONS)}
        return cls(step=step, condition=TextCondition(**captions), **others) if captions else cls(step=step, **others)
