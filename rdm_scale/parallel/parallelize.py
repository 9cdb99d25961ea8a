"""The one place where a plain model becomes a parallel one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rdm_scale.batch import TrainingBatch
from rdm_scale.conditions import Condition
from rdm_scale.config import RunConfig
from rdm_scale.dtypes import PRECISIONS
from rdm_scale.models.blocks import Block
from rdm_scale.models.layers import LayerFactory
from rdm_scale.parallel.host_memory import returning_freed_memory
from rdm_scale.parallel.mesh import Mesh
from rdm_scale.parallel.pipeline.executor import Links, Outputs, Pipeline, Shapes, Tensors
from rdm_scale.parallel.pipeline.schedules import operations
from rdm_scale.parallel.plan import Layout
from rdm_scale.parallel.recompute import recompute_blocks
from rdm_scale.parallel.stage import build_stage, materialize
from rdm_scale.parallel.zero.engine import Zero012, Zero3, ZeroEngine

Inputs = tuple[Tensor, Tensor, Condition]  # latents, timesteps, condition


class ParallelModel:
    """A model over many ranks, to be used as if it were here: called, it predicts; `accumulate` and `step` train it."""

    def __init__(self, config: RunConfig, mesh: Mesh, layout: Layout, zero: ZeroEngine) -> None:
        self.config, self.mesh, self.layout, self.zero = config, mesh, layout, zero
        self._place = layout.placement
        self._links = Links(mesh) if mesh.pipeline_size > 1 else None
        self._pipelines: dict[int, Pipeline] = {}

    def __call__(self, latents: Tensor, timesteps: Tensor, condition: Condition = None) -> Tensor:
        """The model's prediction for this data-parallel rank's samples, on all ranks that share them. No gradients."""
        shapes = self.boundary(latents)
        carried: Any = ()
        across: dict[int, Tensors] = {}  # by the chunk that takes them
        for chunk in range(self._place.chunks):
            rank, before = self._place.rank_of(chunk), self._place.rank_of(max(chunk - 1, 0))
            if rank == self.mesh.pipeline_rank:
                if before != rank and self._links is not None:
                    carried = self._links.receive(before, shapes)
                given = (*carried, *across.pop(chunk, ())) if chunk else (latents, timesteps)
                carried = self.zero(chunk, latents.shape[2:], condition, *given)
                if chunk != self._place.chunks - 1:
                    carried, across[self._place.mirror_of(chunk)] = carried[: len(shapes)], carried[len(shapes) :]
            elif before == self.mesh.pipeline_rank and chunk and self._links is not None:
                self._links.send(rank, carried)
        if self._links is None:
            return carried
        self._links.wait()
        channels = latents.shape[1] * (2 if self.config.model.learned_variance else 1)
        prediction = carried if self._holds_last else latents.new_empty(latents.shape[0], channels, *latents.shape[2:])
        return self._from_last(prediction)

    def accumulate(
        self, micro_batches: Sequence[TrainingBatch], inputs: Callable[[TrainingBatch], Inputs],
        loss: Callable[[Tensor, TrainingBatch], Tensor],
    ) -> Tensor:  # fmt: skip
        """Adds the gradient of the mean loss over this rank's samples, to be used by the next `step`.

        Args:
            micro_batches: this data-parallel rank's samples.
            inputs: what the model takes for a micro-batch.
            loss: from a prediction and its micro-batch to the loss of each sample [B].

        Returns:
            The loss of each sample, on all ranks that share them.
        """
        number = len(micro_batches)
        if number not in self._pipelines:
            orders = operations(self.config.parallel.schedule, self._place, number)
            self._pipelines[number] = Pipeline(self._place, orders, self.mesh.pipeline_rank, self._links)
        calls = _TrainingCalls(self, micro_batches, inputs, loss)
        with self.zero.accumulating():
            self._pipelines[number].run(calls)
        samples = sum(map(len, micro_batches))
        losses = torch.cat(calls.losses) if calls.losses else torch.empty(samples, device=self.mesh.device)
        return self._from_last(losses)

    def step(self, lr: float) -> float:
        """Clips, updates the weights and returns the global gradient norm; see `ZeroEngine.step`."""
        return self.zero.step(lr)

    def boundary(self, latents: Tensor) -> Shapes:
        """Shapes and types of what passes between chunks, for a micro-batch: the stream and the condition."""
        model, train, tensor = self.config.model, self.config.train, self.mesh.tensor_size
        tokens = model.tokens_of(latents.shape[2:]) // (tensor if self.config.parallel.sequence else 1)
        batch, width = len(latents), model.hidden_size
        residual, compute = PRECISIONS[train.residual_dtype].torch, PRECISIONS[train.precision].torch
        return [((tokens, batch, width), residual), ((batch, width), compute)]

    @property
    def _holds_last(self) -> bool:
        return self._place.rank_of(self._place.chunks - 1) == self.mesh.pipeline_rank

    def _from_last(self, tensor: Tensor) -> Tensor:
        """A tensor of the rank that holds the last chunk, on all ranks of its pipeline."""
        if self._links is not None:
            tensor = tensor.contiguous()
            source = dist.get_process_group_ranks(self.mesh.pipeline_group)[self._place.rank_of(self._place.chunks - 1)]
            dist.broadcast(tensor, source, group=self.mesh.pipeline_group)
        return tensor


class _TrainingCalls:
    """The chunks of this rank during one step (pipeline.Chunks)."""

    def __init__(
        self, model: ParallelModel, micro_batches: Sequence[TrainingBatch], inputs: Callable[[TrainingBatch], Inputs],
        loss: Callable[[Tensor, TrainingBatch], Tensor],
    ) -> None:  # fmt: skip
        self.model, self.micro_batches, self.inputs_of, self.loss_of = model, micro_batches, inputs, loss
        self.losses: list[Tensor] = []
        self.last = model.layout.placement.chunks - 1

    def forward(self, chunk: int, micro_batch: int, inputs: Tensors) -> Outputs:
        batch = self.micro_batches[micro_batch]
        *first, condition = self.inputs_of(batch)
        outputs = self.model.zero(chunk, batch.latents.shape[2:], condition, *(inputs if chunk else first))
        if chunk != self.last:
            onward = len(self.shapes(micro_batch))
            return Outputs(outputs[:onward], outputs[onward:])
        loss_B = self.loss_of(outputs, batch)
        self.losses.append(loss_B.detach())
        return Outputs((loss_B.mean() / len(self.micro_batches),))

    def backward(self, outputs: Tensors, gradients: tuple[Tensor | None, ...]) -> None:
        self.model.zero.backward(outputs, gradients)

    def shapes(self, micro_batch: int) -> Shapes:
        return self.model.boundary(self.micro_batches[micro_batch].latents)


def parallelize(
    config: RunConfig, mesh: Mesh, layout: Layout, build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
) -> ParallelModel:
    """Builds this rank's part of the model of a configuration, initialized and ready to train."""
    layers = LayerFactory()
    if mesh.tensor_size > 1:
        from rdm_scale.parallel.tensor import TensorParallelLayers

        layers = TensorParallelLayers(mesh, config.parallel.sequence)
    stage = build_stage(config, mesh, layout, layers)
    recompute_blocks(stage.blocks.values(), config.parallel.recompute)
    real = materialize(stage, config, mesh.device)
    arguments = (stage, real, config, mesh, build_optimizer, [Block])
    with returning_freed_memory():
        if config.parallel.zero_stage == 3:
            return ParallelModel(config, mesh, layout, Zero3(*arguments, keep_gathered=layout.keep_gathered))
        return ParallelModel(config, mesh, layout, Zero012(config.parallel.zero_stage, *arguments))
