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

With `parallel.overlap` there is a flat parameter for each bucket of blocks and parameter group (`buckets`). All buckets
are gathered in the background, and the first block of each waits for its own; a bucket's gradients are reduced in the
background as soon as the last backward has left its first block.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rdm_scale.batch import ModelInputs
from rdm_scale.dtypes import PRECISIONS
from rdm_scale.parallel.megatron_adapter import ModelParallelUnit
from rdm_scale.parallel.pipeline.boundary import StageInputs, StageOutputs
from rdm_scale.parallel.zero import deepspeed_adapter as deepspeed
from rdm_scale.parallel.zero.background import Background
from rdm_scale.parallel.zero.buckets import ParameterBucket, assign_buckets
from rdm_scale.parallel.zero.engine import ParameterRange, ZeroEngine
from rdm_scale.parallel.zero.flat_parameters import FlatKind, FlatParameter, flat_parameters

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
            self._empty_gradients(self._ordered)
            raise
        if len(self._moved) < len(self._ordered):
            torch._foreach_zero_([view for i, view in enumerate(self._gradient_views) if i not in self._moved])
        for bucket in self._buckets:
            bucket.wait()
            self._reduce(bucket)
        for bucket in self._buckets:
            bucket.wait()

    @property
    def filled(self) -> set[int]:
        """Parameters, by number, whose gradient buffer holds gradients of this step."""
        return self._moved

    def discard_gradients(self) -> None:
        """Discard the gradients that backwards of this step have left."""
        self._empty_gradients(self._ordered)
        self._moved.clear()

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], last: bool = True) -> None:
        self._last_backward = last
        torch.autograd.backward(outputs, gradients)
        self._move_gradients(range(len(self._ordered)))

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        self._set_learning_rate(lr)
        norm = self._gradient_norm()
        self._divisor = self._divisor_of(norm)
        if self._shards is not self.optimizer.gradients:
            torch._foreach_copy_(self.optimizer.gradients, self._shards)
        self._recorded_undivided = self.optimizer.step_divided(self._divisor, norm.isfinite())
        self.publish_master_weights()
        return norm

    def publish_master_weights(self) -> None:
        super().publish_master_weights()
        for bucket in self._buckets:
            bucket.gathered = self.mesh.shard.size == 1  # then the shards are the parameters

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        self._gather()
        for bucket in self._buckets:
            bucket.wait()
        self.stage.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.stage.train()

    @contextlib.contextmanager
    def recording_gradients(self) -> Iterator[dict[int, Tensor]]:
        with super().recording_gradients() as squares:
            yield squares
        if self._recorded_undivided:  # sums over the ranks, before clipping
            for block, square in squares.items():
                squares[block] = square / self._divisor.to(square.device) ** 2  # with offloading on the host

    def parameter_tensors(self) -> list[Tensor]:
        return [*self._weights, *self.optimizer.weights]

    def gradient_tensors(self) -> list[Tensor]:
        return [*self._gradients, *self._shards]

    def _gather(self) -> None:
        """All-gather the parameters in the background, unless they are as they were published last."""
        for bucket in self._buckets:
            bucket.reduced = False
            if not bucket.gathered:
                bucket.wait = self._background.start(partial(self._gather_flats, bucket.flats))
                bucket.gathered = True
        self._buckets[0].wait()

    def _gather_flats(self, numbers: Sequence[int]) -> None:
        for i in numbers:
            dist.all_gather_into_tensor(self._weights[i], self.optimizer.weights[i], group=self.mesh.shard.group)

    def _enter(self, bucket: ParameterBucket, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Before a bucket's first block: wait for its parameters, and have its gradients reduced after its backward."""
        bucket.wait()
        z_SBD = inputs[0]
        if z_SBD.requires_grad and torch.is_grad_enabled():
            z_SBD.register_hook(partial(self._leave, bucket))

    def _leave(self, bucket: ParameterBucket, gradient: Tensor) -> None:
        """In the backward, when the gradient of the input of a bucket's first block is there: reduce gradients."""
        missing = [i for i in bucket.parameters if self._ordered[i].grad is None]
        if self._last_backward and not missing:
            self._move_gradients(bucket.parameters)
            self._reduce(bucket)

    @torch.no_grad()
    def _move_gradients(self, numbers: Sequence[int]) -> None:
        """Move gradients of a backward into the flat buffers, or add them to what a backward has left there."""
        parameters, views, moved = [self._ordered[i] for i in numbers], self._gradient_views, self._moved
        gradients = [(i, parameter.grad) for i, parameter in zip(numbers, parameters, strict=True)]
        found = [(i, gradient) for i, gradient in gradients if gradient is not None]
        first = [(views[i], gradient) for i, gradient in found if i not in moved]
        again = [(views[i], gradient) for i, gradient in found if i in moved]
        if first:
            torch._foreach_copy_([view for view, _ in first], [gradient for _, gradient in first])
        if again:
            torch._foreach_add_([view for view, _ in again], [gradient for _, gradient in again])
        moved.update([i for i, _ in found])
        self._empty_gradients(parameters)

    def _empty_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.grad = None

    def _reduce(self, bucket: ParameterBucket) -> None:
        """Sum a bucket's gradients over the data-parallel ranks in the background, unless that has been started."""
        if self.mesh.data_size > 1 and not bucket.reduced:
            bucket.wait = self._background.start(partial(self._reduce_flats, bucket.flats))
            bucket.reduced = True

    @torch.no_grad()
    def _reduce_flats(self, numbers: Sequence[int]) -> None:
        """Sum the gradients of flat parameters, each rank's shard on that rank."""
        for i in numbers:
            shard, unsharded = self._shards[i], self._gradients[i]
            total, rounded = shard, unsharded
            if self._reduce_dtype is not shard.dtype:
                rounded = unsharded.to(self._reduce_dtype)
                total = torch.empty_like(shard, dtype=self._reduce_dtype) if self.mesh.shard.size > 1 else rounded
            if self.mesh.shard.size > 1:
                dist.reduce_scatter_tensor(total, rounded, group=self.mesh.shard.group)
            if self.mesh.copies.size > 1:
                dist.all_reduce(total, group=self.mesh.copies.group)
            if total is not shard:
                shard.copy_(total)

    def _gradient_norm(self) -> Tensor:
        """Norm of the mean gradient over all ranks, each parameter counted once: a scalar in float64."""
        square = torch.stack(torch._foreach_norm(self._counted)).double().square().sum()
        if self.mesh.shard.size > 1:
            dist.all_reduce(square, group=self.mesh.shard.group)
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
        } | self._offload_settings()

    def _offload_settings(self) -> dict[str, Any]:
        if not self._offloads:
            return {}
        return {"offload_optimizer": {"device": "cpu", "pin_memory": self.mesh.device.type == "cuda"}}

    @property
    def _offloads(self) -> bool:
        return self.config.parallel.offload == "optimizer"

    def _make_optimizer(
        self,
        stage: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: dict[str, Any],
        unit: type[ModelParallelUnit],
        leaf_type: type[nn.Module],
    ) -> deepspeed.FlatOptimizer:
        parallel = self.config.parallel
        self._overlaps = parallel.overlap and self.mesh.data_size > 1
        self._background = Background(self.mesh.device, self._overlaps)
        self._reduce_dtype = PRECISIONS[parallel.reduce_dtype].torch
        bucket_of, first_blocks = assign_buckets(self.stage) if self._overlaps else ({}, {})
        kinds = {
            id(parameter): FlatKind(bucket_of.get(name, 0), replicated=self.slices[name].count == 1)
            for name, parameter in stage.named_parameters()
        }
        layouts = [
            flat_parameters(group["params"], lambda parameter: kinds[id(parameter)], self.mesh.shard.size)
            for group in optimizer.param_groups
        ]
        unsharded = [[layout.flatten() for layout in of_group] for of_group in layouts]
        weights = {id(flat): flat.detach() for of_group in unsharded for flat in of_group}  # DeepSpeed empties `flat`
        layout_of = {
            id(flat): layout
            for flats, of_group in zip(unsharded, layouts, strict=True)
            for flat, layout in zip(flats, of_group, strict=True)
        }
        flat_optimizer = deepspeed.FlatOptimizer(unsharded, self.mesh.shard.group, optimizer, settings, unit)
        self._layouts: list[FlatParameter] = [layout_of[id(flat)] for flat in flat_optimizer.flats]
        self._allocate(flat_optimizer, [weights[id(flat)] for flat in flat_optimizer.flats])
        self._make_buckets(first_blocks)
        return flat_optimizer

    def _make_buckets(self, first_blocks: dict[int, nn.Module]) -> None:
        """Make the buckets, with a hook on the first block of each."""
        flats: dict[int, list[int]] = defaultdict(list)
        parameters: dict[int, list[int]] = defaultdict(list)
        for number, layout in enumerate(self._layouts):
            flats[layout.kind.bucket].append(number)
        of_parameters = [layout.kind.bucket for layout in self._layouts for _ in layout.parameters]
        for number, bucket in enumerate(of_parameters):
            parameters[bucket].append(number)
        self._buckets = [ParameterBucket(flats[number], parameters[number]) for number in range(max(flats) + 1)]
        for number, block in first_blocks.items():
            block.register_forward_pre_hook(partial(self._enter, self._buckets[number]))

    def _allocate(self, optimizer: deepspeed.FlatOptimizer, weights: list[Tensor]) -> None:
        """Set the unsharded buffers; the shards are those of DeepSpeed, but for gradients whose update is offloaded."""
        self._shards: list[Tensor] = optimizer.gradients
        if self._offloads:
            self._shards = [torch.zeros_like(flat, dtype=torch.float32) for flat in optimizer.weights]
        if self.mesh.shard.size == 1:  # the shards are everything
            self._weights, self._gradients = optimizer.weights, self._shards
            for layout, flat in zip(self._layouts, self._weights, strict=True):
                layout.adopt(flat)
        else:
            self._weights = weights
            self._gradients = [torch.zeros_like(flat, dtype=torch.float32) for flat in weights]
        self._ordered = [parameter for layout in self._layouts for parameter in layout.parameters]
        self._gradient_views = [
            view for layout, flat in zip(self._layouts, self._gradients, strict=True) for view in layout.views(flat)
        ]
        self._counted = [
            part
            for layout, shard in zip(self._layouts, self._shards, strict=True)
            if self.mesh.tensor_rank == 0 or not layout.kind.replicated
            for part in shard.split(_NORM_ELEMENTS[shard.device.type])
        ]

    def _ranges(self, names: dict[int, str]) -> Iterator[ParameterRange]:
        start = 0  # of a shard, in the concatenation of the master weights
        for layout in self._layouts:
            share = layout.numel // self.mesh.shard.size
            begin = self.mesh.shard.rank * share
            for held in layout.ranges(begin, begin + share):
                name = names[id(held.parameter)]
                shape, part = tuple(held.parameter.shape), self.slices[name]
                yield ParameterRange(name, shape, held.first, held.numel, start + held.start, part)
            start += share
