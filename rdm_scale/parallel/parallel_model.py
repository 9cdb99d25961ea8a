"""A model spread over many ranks, as training, sampling, measurements and checkpoints use it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rdm_scale.batch import ModelInputs, TrainingBatch
from rdm_scale.conditions import Condition
from rdm_scale.config import RunConfig
from rdm_scale.parallel.mesh import Mesh
from rdm_scale.parallel.pipeline.executor import Links, Outputs, Pipeline, Shapes, Tensors
from rdm_scale.parallel.pipeline.schedules import Operation, operations
from rdm_scale.parallel.plan import Layout
from rdm_scale.parallel.zero.engine import ParameterRange, ZeroEngine

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TrainingObjective(Protocol):
    """Objective as `ParallelModel.accumulate` uses it; diffusion.Objective is one."""

    def model_inputs(self, batch: TrainingBatch) -> ModelInputs:
        """Inputs of the model for a micro-batch."""

    def sample_losses(self, prediction: Tensor, batch: TrainingBatch) -> Tensor:
        """Loss [B] of each sample of a micro-batch."""


class ShardedState(NamedTuple):
    """Training state of this rank: flat fp32 buffers, all laid out alike; `ParallelModel.ranges` says what they hold.

    The order of the fields is that of the entries in checkpoints.
    """

    weights: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    ema: list[Tensor]


class ParallelModel:
    """A model over many ranks. All methods are collective over the ranks that hold the model together.

    Attributes:
        ranges: what this rank's flat buffers hold.
        owned_ranges: those of them that this rank and no other writes into a checkpoint.
        blocks: this rank's blocks by their number in the model.
        on_action: measurement hook, called before each action of the pipeline and, with None, after the last one.
    """

    def __init__(self, config: RunConfig, mesh: Mesh, layout: Layout, engine: ZeroEngine) -> None:
        self.config, self.mesh, self.layout = config, mesh, layout
        self.ranges: list[ParameterRange] = engine.ranges
        self.owned_ranges: list[ParameterRange] = engine.owned_ranges
        self.blocks: dict[int, nn.Module] = engine.blocks
        self.on_action: Callable[[Operation | None], None] | None = None
        self.channels = Links(mesh) if mesh.pipeline_size > 1 else None
        self._engine = engine
        self._ema = [weights.clone() for weights in engine.master_weights]
        self._place = layout.placement
        self._pipelines: dict[int, Pipeline] = {}

    def __call__(self, latents: Tensor, timesteps: Tensor, condition: Condition = None) -> Tensor:
        """Prediction for this data-parallel rank's samples, on all ranks that share them; no gradients."""
        shapes = self.boundary(latents)
        carried: Any = ()
        across: dict[int, Tensors] = {}  # by the chunk that takes them
        for chunk in range(self._place.chunks):
            rank, before = self._place.rank_of(chunk), self._place.rank_of(max(chunk - 1, 0))
            if rank == self.mesh.pipeline_rank:
                if before != rank and self.channels is not None:
                    carried = self.channels.receive(before, shapes)
                given = (*carried, *across.pop(chunk, ())) if chunk else (latents, timesteps)
                carried = self._engine(chunk, latents.shape[2:], condition, *given)
                if chunk != self._place.chunks - 1:
                    carried, across[self._place.mirror_of(chunk)] = carried[: len(shapes)], carried[len(shapes) :]
            elif before == self.mesh.pipeline_rank and chunk and self.channels is not None:
                self.channels.send(rank, carried)
        if self.channels is None:
            return carried
        self.channels.wait()
        channels = latents.shape[1] * (2 if self.config.model.learned_variance else 1)
        prediction = carried if self._holds_last else latents.new_empty(latents.shape[0], channels, *latents.shape[2:])
        return self._broadcast_from_last(prediction)

    def accumulate(self, micro_batches: Sequence[TrainingBatch], objective: TrainingObjective) -> Tensor:
        """Run the forwards and backwards of a step: accumulate the gradient of the mean loss, for the next `step`.

        Args:
            micro_batches: this data-parallel rank's samples.

        Returns:
            Loss of each sample, on all ranks that share them.
        """
        pipeline = self._pipeline(len(micro_batches))
        calls = _TrainingCalls(self, self._engine, micro_batches, objective)
        with self._engine.accumulating():
            pipeline.run(calls)
        samples = sum(map(len, micro_batches))
        losses = torch.cat(calls.losses) if calls.losses else torch.empty(samples, device=self.mesh.device)
        return self._broadcast_from_last(losses)

    def step(self, lr: float) -> float:
        """Clip the gradients, update the weights and return the global gradient norm before clipping.

        If a gradient is not finite nothing is updated, and inf is returned.
        """
        return self._engine.step(lr)

    def clip_factor(self, grad_norm: float) -> float:
        """Factor by which `step` divides gradients of this global norm."""
        limit = self.config.optimizer.grad_clip
        return max(1.0, (grad_norm + 1e-6) / limit) if limit else 1.0  # as DeepSpeed computes it

    def recording_gradients(self) -> contextlib.AbstractContextManager[dict[int, Tensor]]:
        """Context in which `step` records squared gradient norms by block, see ZeroEngine.recording_gradients."""
        return self._engine.recording_gradients()

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """Move the EMA weights towards the weights: ema = decay * ema + (1 - decay) * weights."""
        torch._foreach_lerp_(self._ema, self._engine.master_weights, 1 - decay)

    @contextlib.contextmanager
    def evaluating(self, *, ema: bool = False) -> Iterator[None]:
        """Context for predictions without gradients or dropout; with `ema`, with the EMA weights."""
        with self._engine.swapped_weights(self._ema) if ema else contextlib.nullcontext(), self._engine.evaluating():
            yield

    def state(self) -> ShardedState:
        """Training state as it is; the optimizer's part exists after the first `step` or a `restoring`."""
        exp_avg, exp_avg_sq = self._engine.optimizer_state()
        return ShardedState(self._engine.master_weights, exp_avg, exp_avg_sq, self._ema)

    @contextlib.contextmanager
    def restoring(self, step: int) -> Iterator[ShardedState]:
        """Context in which the caller fills the state with that after `step` steps; on leaving, it is in effect."""
        self._engine.reset_optimizer_state(step)
        yield self.state()
        self._engine.publish_master_weights()

    def tensors_by_kind(self) -> dict[str, list[Tensor]]:
        """Tensors that this rank holds between steps, for measurements: parameters, gradients, optimizer and average.

        Names of the kinds are those of the columns of the plan's table.
        """
        state = self.state()
        optimizer = [*state.weights, *state.exp_avg, *state.exp_avg_sq]
        kinds = {"parameters": self._engine.parameter_tensors(), "gradients": self._engine.gradient_tensors()}
        return kinds | {"optimizer": optimizer, "average": state.ema}

    def boundary(self, latents: Tensor) -> Shapes:
        """Shapes and types of what passes between chunks, for a micro-batch: the stream and the condition."""
        model, train, tensor = self.config.model, self.config.train, self.mesh.tensor_size
        tokens = model.tokens_of(latents.shape[2:]) // (tensor if self.config.parallel.sequence else 1)
        batch, width = len(latents), model.hidden_size
        return [((tokens, batch, width), _DTYPES[train.residual_dtype]), ((batch, width), _DTYPES[train.precision])]

    def _pipeline(self, micro_batches: int) -> Pipeline:
        if micro_batches not in self._pipelines:
            orders = operations(self.config.parallel.schedule, self._place, micro_batches)
            self._pipelines[micro_batches] = Pipeline(self._place, orders, self.mesh.pipeline_rank, self.channels)
        pipeline = self._pipelines[micro_batches]
        pipeline.on_action = self.on_action
        return pipeline

    @property
    def _holds_last(self) -> bool:
        return self._place.rank_of(self._place.chunks - 1) == self.mesh.pipeline_rank

    def _broadcast_from_last(self, tensor: Tensor) -> Tensor:
        """Tensor of the rank that holds the last chunk, on all ranks of its pipeline."""
        if self.channels is not None:
            tensor = tensor.contiguous()
            source = dist.get_process_group_ranks(self.mesh.pipeline_group)[self._place.rank_of(self._place.chunks - 1)]
            dist.broadcast(tensor, source, group=self.mesh.pipeline_group)
        return tensor


class _TrainingCalls:
    """Forwards and backwards of this rank's chunks during one step (pipeline.Chunks)."""

    def __init__(
        self,
        model: ParallelModel,
        engine: ZeroEngine,
        micro_batches: Sequence[TrainingBatch],
        objective: TrainingObjective,
    ) -> None:
        self.model, self.engine, self.micro_batches, self.objective = model, engine, micro_batches, objective
        self.losses: list[Tensor] = []
        self.last = model.layout.placement.chunks - 1

    def forward(self, chunk: int, micro_batch: int, inputs: Tensors) -> Outputs:
        batch = self.micro_batches[micro_batch]
        *first, condition = self.objective.model_inputs(batch)
        outputs = self.engine(chunk, batch.latents.shape[2:], condition, *(inputs if chunk else first))
        if chunk != self.last:
            onward = len(self.shapes(micro_batch))
            return Outputs(outputs[:onward], outputs[onward:])
        loss_B = self.objective.sample_losses(outputs, batch)
        self.losses.append(loss_B.detach())
        return Outputs((loss_B.mean() / len(self.micro_batches),))

    def backward(self, outputs: Tensors, gradients: tuple[Tensor | None, ...]) -> None:
        self.engine.backward(outputs, gradients)

    def shapes(self, micro_batch: int) -> Shapes:
        return self.model.boundary(self.micro_batches[micro_batch].latents)
