"""ZeRO stage 3 with parameters all-gathered once a step, in buffers that stay in place.

The parameters of the model are views of a few flat parameters (`flat_parameters`), one for each parameter group of the
optimizer, which DeepSpeed shards over the data-parallel ranks. So a step takes the same number of calls and collectives
for any number of parameters and ranks:

    all-gather      rank r's shard is the r-th part of a flat parameter: one collective each, into place
    backward        gradients leave `.grad` for flat fp32 buffers in one call after each backward. A sum over
                    micro-batches is never rounded to bf16, and a compiled block never sees a gradient of another dtype
    reduce-scatter  one collective each, out of those buffers
    step            one norm over the shards; the clip factor goes into AdamW's kernel
    publication     one copy of the master weights to the shards of the flat parameters
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rdm_scale.batch import ModelInputs
from rdm_scale.parallel.megatron_adapter import ModelParallelUnit
from rdm_scale.parallel.pipeline.boundary import StageInputs, StageOutputs
from rdm_scale.parallel.zero import deepspeed_adapter as deepspeed
from rdm_scale.parallel.zero.engine import ParameterRange, ZeroEngine
from rdm_scale.parallel.zero.flat_parameters import FlatParameter, flat_parameters

# Elements of which one sum of squares is taken. On CPUs torch adds them one after the other in fp32, which for millions
# loses digits.
_NORM_ELEMENTS = {"cpu": 2**16, "cuda": 2**30}


class Zero3Gathered(ZeroEngine):
    """ZeRO stage 3 with parameters gathered, and gradients reduced, once a step."""

    optimizer: deepspeed.FlatOptimizer

    def __call__(self, chunk: int, model_inputs: ModelInputs, inputs: StageInputs) -> StageOutputs:
        outputs: StageOutputs = self.stage(chunk, model_inputs, inputs)
        return outputs

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        self._gather()
        self._moved: set[int] = set()  # parameters, by number, whose gradient buffer holds gradients of this step
        try:
            yield
        except BaseException:
            self._empty_gradients()
            raise
        if len(self._moved) < len(self._ordered):
            torch._foreach_zero_([view for i, view in enumerate(self._gradient_views) if i not in self._moved])
        self._reduce_gradients()

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        torch.autograd.backward(outputs, gradients)
        self._move_gradients()

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        self._set_learning_rate(lr)
        norm = self._gradient_norm()
        self._divisor = self._divisor_of(norm)
        self.optimizer.step_divided(self._divisor, norm.isfinite())
        self.publish_master_weights()
        return norm

    def publish_master_weights(self) -> None:
        super().publish_master_weights()
        self._gathered = self.mesh.data_size == 1  # then the shards are the parameters

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        self._gather()
        self.stage.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.stage.train()

    @contextlib.contextmanager
    def recording_gradients(self) -> Iterator[dict[int, Tensor]]:
        with super().recording_gradients() as squares:  # of sums over the ranks, before clipping
            yield squares
        for block in squares:
            squares[block] /= self._divisor**2

    def parameter_tensors(self) -> list[Tensor]:
        return [*self._weights, *self.optimizer.weights]

    def gradient_tensors(self) -> list[Tensor]:
        return [*self._gradients, *self.optimizer.gradients]

    def _gather(self) -> None:
        """All-gather the parameters, unless they are as they were published last."""
        if not self._gathered:
            for unsharded, shard in zip(self._weights, self.optimizer.weights, strict=True):
                dist.all_gather_into_tensor(unsharded, shard, group=self.mesh.data_group)
            self._gathered = True

    @torch.no_grad()
    def _move_gradients(self) -> None:
        """Move the gradients of a backward into the flat buffers, or add them to what a backward has left there."""
        gradients, views, moved = [parameter.grad for parameter in self._ordered], self._gradient_views, self._moved
        found = [(i, gradient) for i, gradient in enumerate(gradients) if gradient is not None]
        first = [(views[i], gradient) for i, gradient in found if i not in moved]
        again = [(views[i], gradient) for i, gradient in found if i in moved]
        if first:
            torch._foreach_copy_([view for view, _ in first], [gradient for _, gradient in first])
        if again:
            torch._foreach_add_([view for view, _ in again], [gradient for _, gradient in again])
        moved.update([i for i, _ in found])
        self._empty_gradients()

    def _empty_gradients(self) -> None:
        for parameter in self._ordered:
            parameter.grad = None

    def _reduce_gradients(self) -> None:
        """Sum the gradients over the data-parallel ranks, each rank's shard on that rank."""
        if self.mesh.data_size > 1:
            for shard, unsharded in zip(self.optimizer.gradients, self._gradients, strict=True):
                dist.reduce_scatter_tensor(shard, unsharded, group=self.mesh.data_group)

    def _gradient_norm(self) -> Tensor:
        """Norm of the mean gradient over all ranks, each parameter counted once: a scalar in float64."""
        square = torch.stack(torch._foreach_norm(self._counted)).double().square().sum()
        if self.mesh.data_size > 1:
            dist.all_reduce(square, group=self.mesh.data_group)
        if self.mesh.replica_size > 1:
            dist.all_reduce(square, group=ModelParallelUnit.get_model_parallel_group())
        return square.sqrt() / self.mesh.data_size

    def _divisor_of(self, norm: Tensor) -> Tensor:
        """Divisor that makes the sums over the data-parallel ranks means, clipped as DeepSpeed does it."""
        limit = self.config.optimizer.grad_clip
        return self.mesh.data_size * (((norm + 1e-6) / limit).clamp(min=1) if limit else torch.ones_like(norm))

    def _zero_settings(self, largest: int) -> dict[str, Any]:
        return {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "contiguous_gradients": False,  # True allocates a buffer for hooks, which are not used
            # torch's linear layer: DeepSpeed's is slower, and saves memory only where parameters are freed between
            # forward and backward.
            "memory_efficient_linear": False,
        }

    def _make_optimizer(
        self,
        stage: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: dict[str, Any],
        unit: type[ModelParallelUnit],
        leaf_type: type[nn.Module],
    ) -> deepspeed.FlatOptimizer:
        sharded = {
            id(parameter) for name, parameter in stage.named_parameters() if self.slices[name].count > 1
        }  # over the tensor-parallel ranks
        layouts = [
            flat_parameters(group["params"], lambda parameter: id(parameter) not in sharded, self.mesh.data_size)
            for group in optimizer.param_groups
        ]
        unsharded = [[layout.flatten() for layout in of_group] for of_group in layouts]
        weights = {id(flat): flat.detach() for of_group in unsharded for flat in of_group}  # DeepSpeed empties `flat`
        layout_of = {
            id(flat): layout
            for flats, of_group in zip(unsharded, layouts, strict=True)
            for flat, layout in zip(flats, of_group, strict=True)
        }
        flat_optimizer = deepspeed.FlatOptimizer(unsharded, self.mesh.data_group, optimizer, settings, unit)
        self._layouts: list[FlatParameter] = [layout_of[id(flat)] for flat in flat_optimizer.flats]
        self._allocate(flat_optimizer, [weights[id(flat)] for flat in flat_optimizer.flats])
        return flat_optimizer

    def _allocate(self, optimizer: deepspeed.FlatOptimizer, weights: list[Tensor]) -> None:
        """Set the unsharded buffers; the shards are those of DeepSpeed."""
        if self.mesh.data_size == 1:  # the shards are everything
            self._weights, self._gradients = optimizer.weights, optimizer.gradients
            for layout, flat in zip(self._layouts, self._weights, strict=True):
                layout.adopt(flat)
        else:
            self._weights = weights
            self._gradients = [torch.zeros_like(flat, dtype=torch.float32) for flat in weights]
        self._gathered = True
        self._ordered = [parameter for layout in self._layouts for parameter in layout.parameters]
        self._gradient_views = [
            view for layout, flat in zip(self._layouts, self._gradients, strict=True) for view in layout.views(flat)
        ]
        self._counted = [
            part
            for layout, shard in zip(self._layouts, optimizer.gradients, strict=True)
            if self.mesh.tensor_rank == 0 or not layout.replicated
            for part in shard.split(_NORM_ELEMENTS[shard.device.type])
        ]

    def _ranges(self, names: dict[int, str]) -> Iterator[ParameterRange]:
        start = 0  # of a shard, in the concatenation of the master weights
        for layout in self._layouts:
            share = layout.numel // self.mesh.data_size
            for held in layout.ranges(self.mesh.data_rank * share, (self.mesh.data_rank + 1) * share):
                name = names[id(held.parameter)]
                shape, part = tuple(held.parameter.shape), self.slices[name]
                yield ParameterRange(name, shape, held.first, held.numel, start + held.start, part)
            start += share
