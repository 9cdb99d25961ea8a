"""ZeRO stage 3: parameters, gradients and optimizer state sharded over the data-parallel ranks."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rdm_scale.batch import ModelInputs
from rdm_scale.parallel.pipeline.boundary import StageInputs, StageOutputs
from rdm_scale.parallel.zero import deepspeed_adapter as deepspeed
from rdm_scale.parallel.zero.engine import ParameterRange, ZeroEngine, starts_of


class Zero3(ZeroEngine):
    """ZeRO stage 3.

    With `keep_gathered` all parameters of this rank are all-gathered once a step, and their gradients reduce-scattered
    once. Otherwise DeepSpeed's hooks all-gather a block's parameters for each of its forwards and backwards, and reduce
    its gradients after each backward.
    """

    optimizer: deepspeed.Stage3Optimizer

    def __call__(self, chunk: int, model_inputs: ModelInputs, inputs: StageInputs) -> StageOutputs:
        outputs = super().__call__(chunk, model_inputs, inputs)
        if not self.keep_gathered:
            self.optimizer.save_gradient_counters()
        return outputs

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        self.optimizer.restore_gradient_counters()
        super().backward(outputs, gradients)

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        if not self.keep_gathered:
            self.optimizer.begin_step_with_hooks()
            yield
            return
        self.optimizer.all_gather()
        try:
            if self.mesh.data_size == 1:
                self._accumulate_in_place()
            yield
            if self.mesh.data_size > 1:
                self._reduce_scatter_gradients()
        finally:
            for parameter in self.parameters:
                parameter.grad = None
        self.optimizer.release()
        self.optimizer.end_step_without_hooks()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        with super().evaluating():
            if self.keep_gathered:
                self.optimizer.all_gather()
            yield
            if self.keep_gathered:
                self.optimizer.release()

    def _accumulate_in_place(self) -> None:
        """Let backwards add to the buffer from which DeepSpeed steps: a single rank has nothing to reduce."""
        gradients = self.optimizer.gradients.zero_()
        sizes = [parameter.numel() for parameter in self.optimizer.parameters]
        for parameter, gradient in zip(self.optimizer.parameters, gradients.split(sizes), strict=True):
            parameter.grad = gradient.view_as(parameter)

    @torch.no_grad()
    def _reduce_scatter_gradients(self) -> None:
        """Reduce-scatter all gradients at once, into the buffer from which DeepSpeed steps."""
        size, gradients = self.mesh.data_size, self.optimizer.gradients
        unsharded = gradients.new_zeros(size, gradients.numel())  # a row for each rank
        start = 0
        for parameter in self.optimizer.parameters:
            count = self.optimizer.share_of(parameter).numel
            if parameter.grad is not None:
                gradient = parameter.grad.flatten()
                if gradient.numel() == size * count:
                    unsharded[:, start : start + count] = gradient.view(size, count)
                else:
                    for rank, part in enumerate(gradient.split(count)):
                        unsharded[rank, start : start + part.numel()] = part
                parameter.grad = None
            start += count
        dist.reduce_scatter_tensor(gradients, unsharded.flatten(), group=self.mesh.data_group)
        gradients.div_(size)

    def _zero_settings(self, largest: int) -> dict[str, Any]:
        return {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            # Never keep a parameter for its next use: with every release DeepSpeed would search for that use, which
            # takes time that grows with the square of the depth.
            "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": 2 * largest,
            "stage3_prefetch_bucket_size": 0 if self.keep_gathered else largest,
            "contiguous_gradients": False,  # True copies each gradient once more, into a buffer of its own
            "reduce_bucket_size": largest,
            "overlap_comm": self.mesh.device.type == "cuda",
            # DeepSpeed's linear layer: torch's saves the all-gathered weight for its backward, although the weight is
            # to be freed after the forward. With keep_gathered nothing is freed before the last backward, and torch's
            # layer is faster.
            "memory_efficient_linear": not self.keep_gathered,
        }

    def _register(self, child: nn.Module, settings: dict[str, Any]) -> None:
        parameters = list(child.parameters())
        deepspeed.shard(parameters, self.parameters, self.mesh.data_group, settings)
        if self.keep_gathered:
            for parameter in parameters:  # a sum over a step's micro-batches in bf16 would lose small terms
                parameter.grad_dtype = torch.float32
        super()._register(child, settings)

    def _make_optimizer(self, *arguments: Any) -> deepspeed.Stage3Optimizer:
        optimizer = deepspeed.Stage3Optimizer(*arguments)
        if self.keep_gathered:
            optimizer.remove_hooks()
        return optimizer

    def _ranges(self, names: dict[int, str]) -> Iterator[ParameterRange]:
        starts = starts_of(self.master_weights)
        for parameter in self.optimizer.parameters:
            share, name = self.optimizer.share_of(parameter), names[id(parameter)]
            first = min(share.numel * self.mesh.data_rank, share.unsharded_numel)  # the last ranks' ranges are padded
            yield ParameterRange(
                name,
                share.unsharded_shape,
                first,
                min(share.numel, share.unsharded_numel - first),
                starts[share.group] + share.offset,
                self.slices[name],
            )
