"""ZeRO stage 3: parameters, gradients and optimizer state sharded over the data-parallel ranks."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from rdm_scale.batch import ModelInputs
from rdm_scale.dtypes import PRECISIONS
from rdm_scale.parallel.pipeline.boundary import StageInputs, StageOutputs
from rdm_scale.parallel.zero import deepspeed_adapter as deepspeed
from rdm_scale.parallel.zero.engine import ParameterRange, ZeroEngine, starts_of


class Zero3(ZeroEngine):
    """ZeRO stage 3 by block.

    DeepSpeed's hooks all-gather a block's parameters for each of its forwards and backwards, and reduce its gradients
    after each backward.
    """

    optimizer: deepspeed.Stage3Optimizer

    def __call__(self, chunk: int, model_inputs: ModelInputs, inputs: StageInputs) -> StageOutputs:
        outputs = super().__call__(chunk, model_inputs, inputs)
        self.optimizer.save_gradient_counters()
        return outputs

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], last: bool = True) -> None:
        self.optimizer.restore_gradient_counters()
        super().backward(outputs, gradients, last)

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        self.optimizer.begin_step_with_hooks()
        yield
        if self.mesh.copies.size > 1:
            gradients = self.optimizer.gradients.div_(self.mesh.copies.size)
            total = gradients.to(PRECISIONS[self.config.parallel.reduce_dtype].torch)
            dist.all_reduce(total, group=self.mesh.copies.group)
            gradients.copy_(total)

    def _zero_settings(self, largest: int) -> dict[str, Any]:
        return {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            # Never keep a parameter for its next use: with every release DeepSpeed would search for that use, which
            # takes time that grows with the square of the depth.
            "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": 2 * largest,
            "stage3_prefetch_bucket_size": largest,
            "contiguous_gradients": False,  # True copies each gradient once more, into a buffer of its own
            "reduce_bucket_size": largest,
            "overlap_comm": self.config.parallel.overlap and self.mesh.device.type == "cuda",
            # DeepSpeed's linear layer: torch's saves the all-gathered weight for its backward, although the weight is
            # to be freed after the forward.
            "memory_efficient_linear": True,
        }

    def _register(self, child: nn.Module, settings: dict[str, Any]) -> None:
        deepspeed.shard(list(child.parameters()), self.parameters, self.mesh.shard.group, settings)
        super()._register(child, settings)

    def _make_optimizer(self, *arguments: Any) -> deepspeed.Stage3Optimizer:
        return deepspeed.Stage3Optimizer(*arguments)

    def _ranges(self, names: dict[int, str]) -> Iterator[ParameterRange]:
        starts = starts_of(self.master_weights)
        for parameter in self.optimizer.parameters:
            share, name = self.optimizer.share_of(parameter), names[id(parameter)]
            first = min(share.numel * self.mesh.shard.rank, share.unsharded_numel)  # the last ranks' ranges are padded
            yield ParameterRange(
                name,
                share.unsharded_shape,
                first,
                min(share.numel, share.unsharded_numel - first),
                starts[share.group] + share.offset,
                self.slices[name],
            )
