"""A model spread over many ranks, as training, sampling, measurements and checkpoints use it."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rdm_scale.batch import ModelInputs, TrainingBatch
from rdm_scale.conditions import Condition
from rdm_scale.config import RunConfig
from rdm_scale.dtypes import PRECISIONS
from rdm_scale.parallel.compile import CompiledBlocks
from rdm_scale.parallel.cuda_graphs import MicroBatchGraphs
from rdm_scale.parallel.mesh import Mesh
from rdm_scale.parallel.pipeline.boundary import BoundarySpec, StageInputs, StageOutputs, Tensors, TensorSpec
from rdm_scale.parallel.pipeline.channels import Channels
from rdm_scale.parallel.pipeline.executor import ActionHook, ChunkOutputs, Pipeline
from rdm_scale.parallel.pipeline.schedules import build_schedule
from rdm_scale.parallel.plan import ParallelPlan
from rdm_scale.parallel.zero.engine import ParameterRange, ZeroEngine


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
        compiled: how they are compiled; None where they run eagerly.
        channels: between pipeline stages; None where there is one stage.
        on_action: measurement hook of the next `accumulate`, see Pipeline.on_action.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        plan: ParallelPlan,
        engine: ZeroEngine,
        compiled: CompiledBlocks | None = None,
        graphs: MicroBatchGraphs | None = None,
    ) -> None:
        self.config, self.mesh, self.plan, self.compiled = config, mesh, plan, compiled
        self.ranges: list[ParameterRange] = engine.ranges
        self.owned_ranges: list[ParameterRange] = engine.owned_ranges
        self.blocks: dict[int, nn.Module] = engine.blocks
        self.on_action: ActionHook | None = None
        self.channels = Channels(mesh) if mesh.pipeline_size > 1 else None
        self._engine = engine
        self._graphs = graphs
        self._eager = False
        self._ema = [weights.clone() for weights in engine.master_weights]
        self._placement = plan.placement
        self._pipelines: dict[int, Pipeline] = {}

    def __call__(self, latents: Tensor, timesteps: Tensor, condition: Condition = None) -> Tensor:
        """Prediction for this data-parallel rank's samples, on all ranks that share them; no gradients."""
        placement, own_rank, channels = self._placement, self.mesh.pipeline_rank, self.channels
        model_inputs = ModelInputs(latents, timesteps, condition)
        local_skips: dict[int, Tensors] = {}  # by the chunk that takes them
        outputs = StageOutputs()
        for chunk in range(placement.chunks):
            rank, previous = placement.rank_of(chunk), placement.rank_of(max(chunk - 1, 0))
            if rank == own_rank:
                boundary = outputs.boundary if chunk else None
                if channels is not None and previous != rank:
                    boundary = channels.receive(previous, self.boundary_spec(latents))
                outputs = self._engine(chunk, model_inputs, StageInputs(boundary, local_skips.pop(chunk, ())))
                local_skips[placement.partner_of(chunk)] = outputs.local_skips
            elif channels is not None and previous == own_rank and chunk:
                assert outputs.boundary is not None
                channels.send(rank, outputs.boundary)
        if channels is not None:
            channels.wait()
        prediction = outputs.prediction
        if prediction is None:  # another rank has computed it
            factor = 2 if self.config.model.learned_variance else 1
            prediction = latents.new_empty(len(latents), factor * latents.shape[1], *latents.shape[2:])
        return self._broadcast_from_last(prediction)

    def accumulate(self, micro_batches: Sequence[TrainingBatch], objective: TrainingObjective) -> Tensor:
        """Run the forwards and backwards of a step: accumulate the gradient of the mean loss, for the next `step`.

        Args:
            micro_batches: this data-parallel rank's samples.

        Returns:
            Loss of each sample, on all ranks that share them.
        """
        pipeline = self._pipeline(len(micro_batches))
        chunks = _TrainingChunks(self, self._engine, micro_batches, objective)
        with self._engine.accumulating():
            replayed = self._replay(micro_batches, objective)
            if replayed is None:
                pipeline.run(chunks)
            else:
                chunks.losses = replayed
        samples = sum(map(len, micro_batches))
        losses = torch.cat(chunks.losses) if chunks.losses else torch.empty(samples, device=self.mesh.device)
        return self._broadcast_from_last(losses)

    def step(self, lr: float) -> Tensor:
        """Clip the gradients, update the weights and return the global gradient norm [] before clipping.

        If a gradient is not finite nothing is updated, and the norm is not finite either. It is on this rank's device,
        and reading it would wait for the step.
        """
        return self._engine.step(lr)

    def clip_factor(self, grad_norm: float) -> float:
        """Factor by which `step` divides gradients of this global norm."""
        limit = self.config.optimizer.grad_clip
        return max(1.0, (grad_norm + 1e-6) / limit) if limit else 1.0  # as DeepSpeed computes it

    def recording_gradients(self) -> contextlib.AbstractContextManager[dict[int, Tensor]]:
        """Context in which `step` records squared gradient norms by block, see ZeroEngine.recording_gradients."""
        return self._engine.recording_gradients()

    @contextlib.contextmanager
    def running_eagerly(self) -> Iterator[None]:
        """Context in which nothing is compiled or replayed, so that hooks of all modules are called."""
        self._eager = True
        try:
            with self.compiled.running_eagerly() if self.compiled else contextlib.nullcontext():
                yield
        finally:
            self._eager = False

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

    def boundary_spec(self, latents: Tensor) -> BoundarySpec:
        """Shapes and dtypes of what passes between chunks for a micro-batch."""
        model, train, tensor = self.config.model, self.config.train, self.mesh.tensor_size
        tokens = model.tokens_of(latents.shape[2:]) // (tensor if self.config.parallel.sequence else 1)
        batch, width = len(latents), model.hidden_size
        return BoundarySpec(
            hidden=TensorSpec((tokens, batch, width), PRECISIONS[train.residual_dtype].torch),
            condition=TensorSpec((batch, width), PRECISIONS[train.precision].torch),
        )

    def _replay(self, micro_batches: Sequence[TrainingBatch], objective: TrainingObjective) -> list[Tensor] | None:
        """Losses of micro-batches that are replayed as CUDA graphs; None if they are not."""
        if self._graphs is None or self._eager or self.on_action is not None:
            return None
        number = len(micro_batches)

        def forward_and_backward(batch: TrainingBatch) -> Tensor:
            chunks = _TrainingChunks(self, self._engine, [batch], objective, number)
            outputs = chunks.forward(0, 0, StageInputs(None))
            assert outputs.loss is not None
            chunks.backward(0, (outputs.loss,), (None,))
            return chunks.losses[0]

        return self._graphs.run(micro_batches, forward_and_backward)

    def _pipeline(self, micro_batches: int) -> Pipeline:
        if micro_batches not in self._pipelines:
            schedule = build_schedule(self.config.parallel.schedule, self._placement, micro_batches)
            self._pipelines[micro_batches] = Pipeline(self._placement, schedule, self.mesh.pipeline_rank, self.channels)
        pipeline = self._pipelines[micro_batches]
        pipeline.on_action = self.on_action
        return pipeline

    def _broadcast_from_last(self, tensor: Tensor) -> Tensor:
        """Tensor of the rank that holds the last chunk, on all ranks of its pipeline."""
        if self.channels is not None:
            tensor = tensor.contiguous()
            last = self._placement.rank_of(self._placement.last_chunk)
            source = dist.get_process_group_ranks(self.mesh.pipeline_group)[last]
            dist.broadcast(tensor, source, group=self.mesh.pipeline_group)
        return tensor


class _TrainingChunks:
    """Forwards and backwards of this rank's chunks during one step (a ChunkRunner)."""

    def __init__(
        self,
        model: ParallelModel,
        engine: ZeroEngine,
        micro_batches: Sequence[TrainingBatch],
        objective: TrainingObjective,
        number: int | None = None,
    ) -> None:
        self.number = number or len(micro_batches)  # of a step
        self.model, self.engine, self.micro_batches, self.objective = model, engine, micro_batches, objective
        self.losses: list[Tensor] = []  # of each micro-batch [B], on the rank that holds the last chunk

    def forward(self, chunk: int, micro_batch: int, inputs: StageInputs) -> ChunkOutputs:
        batch = self.micro_batches[micro_batch]
        outputs = self.engine(chunk, self.objective.model_inputs(batch), inputs)
        if outputs.prediction is None:
            return ChunkOutputs(outputs.boundary, outputs.local_skips)
        loss_B = self.objective.sample_losses(outputs.prediction, batch)
        self.losses.append(loss_B.detach())
        return ChunkOutputs(loss=loss_B.mean() / self.number)

    def backward(self, micro_batch: int, outputs: Tensors, gradients: tuple[Tensor | None, ...]) -> None:
        self.engine.backward(outputs, gradients, last=micro_batch == len(self.micro_batches) - 1)

    def boundary_spec(self, micro_batch: int) -> BoundarySpec:
        return self.model.boundary_spec(self.micro_batches[micro_batch].latents)
