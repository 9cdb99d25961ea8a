"""What a training step needs beside the latents, drawn by key, and a thread that does so ahead of the step."""

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, fields
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from rdm_scale import rng
from rdm_scale.conditions import Condition, TextCondition, replaced
from rdm_scale.data.stream import LatentBatch
from rdm_scale.errors import DataError

if TYPE_CHECKING:
    from rdm_scale.diffusion import Objective


@dataclass(frozen=True)
class TrainingBatch:
    """A batch with all that is random about it.

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
        """What the model takes."""
        if self.text_tokens is None or self.text_mask is None or self.text_pooled is None:
            return self.condition
        return TextCondition(self.text_tokens, self.text_mask, self.text_pooled)

    def __len__(self) -> int:
        return len(self.positions)

    def split(self, micro_batch_size: int) -> "list[TrainingBatch]":
        """The batch in order, in micro-batches of so many samples; the last one may be smaller."""
        parts = {name: value.split(micro_batch_size) for name, value in self.tensors().items()}
        number = len(parts["positions"])
        return [self.of_tensors(self.step, {name: value[i] for name, value in parts.items()}) for i in range(number)]

    def to(self, device: torch.device | str) -> "TrainingBatch":
        return self.of_tensors(self.step, {name: value.to(device) for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Those of the fields that are there, by name."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in values if isinstance(value, Tensor)}

    @classmethod
    def of_tensors(cls, step: int, tensors: dict[str, Tensor]) -> Self:
        """The inverse of `tensors`."""
        return cls(step=step, **tensors)


def draw(
    batch: LatentBatch,
    *,
    objective: "Objective",
    seed: int,
    num_classes: int | None,
    condition_dropout: float,
    empty_caption: TextCondition | None = None,
    purpose: str = "train",
) -> TrainingBatch:
    """Draws timestep, noise and condition dropout of each sample, as functions of (seed, purpose, position) alone.

    Args:
        num_classes: also the null class, which stands for a label dropped or missing; None for a model without classes.
        condition_dropout: probability with which a label or caption is dropped (classifier-free guidance, Ho & Salimans
            2022).
        empty_caption: the one that stands for a caption dropped; None for a model without text.

    Raises:
        DataError: a label that is not below num_classes.
    """
    positions = batch.positions.tolist()
    shape = batch.latents.shape[1:]

    def generators(what: str) -> Iterator[torch.Generator]:
        return (rng.generator(seed, f"{purpose} {what}", position) for position in positions)

    def dropped() -> Tensor:
        uniform = torch.stack([torch.rand((), generator=g) for g in generators("condition dropout")])
        return uniform < condition_dropout

    condition, text = None, {}
    if num_classes is not None:
        _check_labels(batch, num_classes)
        condition = batch.labels.masked_fill(dropped() | (batch.labels < 0), num_classes)
    if empty_caption is not None:
        assert batch.text is not None, "the stream must read captions"
        captions = replaced(batch.text, dropped(), empty_caption)
        text = {f"text_{name}": part for name, part in captions._asdict().items()}
    return TrainingBatch(
        step=batch.step,
        positions=batch.positions,
        ids=batch.ids,
        latents=batch.latents,
        noise=torch.stack([torch.randn(shape, generator=g) for g in generators("noise")]),
        t=torch.tensor([objective.draw_timestep(g) for g in generators("timestep")], dtype=torch.float32),
        condition=condition,
        **text,
    )


def _check_labels(batch: LatentBatch, num_classes: int) -> None:
    unknown = batch.labels >= num_classes
    if unknown.any():
        raise DataError(
            f"the sample with id {batch.ids[unknown][0].item()} has label {batch.labels[unknown][0].item()}, "
            f"and model.num_classes={num_classes}: set model.num_classes to the number of classes of the data"
        )


class Prefetcher:
    """Runs an iterator in a thread, up to `depth` batches ahead of who calls next().

    An error of the iterator is raised by next(), after the batches that came before it, as the same exception.
    """

    def __init__(self, batches: Iterator[TrainingBatch], depth: int) -> None:
        self._depth = depth
        self._ready: deque[TrainingBatch] = deque()
        self._end: BaseException | None = None  # why there will be no more: an error, or StopIteration
        self._closed = False
        self._changed = threading.Condition()
        # A daemon, so that a consumer that dies without closing does not keep the process alive.
        self._thread = threading.Thread(target=self._read, args=(batches,), name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TrainingBatch:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._end is not None)
            if not self._ready:
                assert self._end is not None
                raise self._end
            self._changed.notify_all()
            return self._ready.popleft()

    def close(self) -> None:
        """Ends the thread, once it is through with the batch that it is at, and drops what was read ahead."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._end = self._end or StopIteration()
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _read(self, batches: Iterator[TrainingBatch]) -> None:
        end: BaseException = StopIteration()
        try:
            while self._has_room():
                batch = next(batches)
                with self._changed:
                    self._ready.append(batch)
                    self._changed.notify_all()
        except BaseException as error:
            end = error
        with self._changed:
            self._end = self._end or end
            self._changed.notify_all()

    def _has_room(self) -> bool:
        """Waits until there is room for another batch; False: closed."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._ready) < self._depth or self._closed)
            return not self._closed
