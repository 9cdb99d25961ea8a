"""ZeRO stages 0, 1 and 2: unsharded parameters on every rank, as views of flat buffers."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from rdm_scale.dtypes import PRECISIONS
from rdm_scale.parallel.zero import deepspeed_adapter as deepspeed
from rdm_scale.parallel.zero.engine import ParameterRange, ZeroEngine, starts_of


class Zero012(ZeroEngine):
    """ZeRO stages 0, 1 and 2.

    Stage 0 is DeepSpeed's stage 1 over a group of one rank (`Mesh.shard`), after gradients have been averaged over the
    data-parallel group.
    """

    optimizer: deepspeed.Stage12Optimizer

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.optimizer.drop_gradients()
            raise
        if self.mesh.copies.size > 1:  # stage 0
            gradients = self.optimizer.gradients_of(self.parameters)
            flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(self.mesh.data_size)
            flat = flat.to(PRECISIONS[self.config.parallel.reduce_dtype].torch)
            dist.all_reduce(flat, group=self.mesh.copies.group)
            parts = flat.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)])

    def _zero_settings(self, largest: int) -> dict[str, Any]:
        return {
            "stage": max(self.zero_stage, 1),
            "use_multi_rank_bucket_allreduce": False,  # each gradient is reduced to its owner, not to all ranks
            "reduce_bucket_size": largest,
            "overlap_comm": self.config.parallel.overlap and self.zero_stage == 2 and self.mesh.device.type == "cuda",
        }

    def _make_optimizer(self, *arguments: Any) -> deepspeed.Stage12Optimizer:
        return deepspeed.Stage12Optimizer(*arguments)

    def _ranges(self, names: dict[int, str]) -> Iterator[ParameterRange]:
        rank = self.mesh.shard.rank
        for start, group in zip(starts_of(self.master_weights), self.optimizer.groups, strict=True):
            # This rank's shard, in the concatenation of the group's parameters.
            begin, end = rank * group.shard_numel, (rank + 1) * group.shard_numel
            at = 0
            for parameter in group.parameters:
                low, high = max(at, begin), min(at + parameter.numel(), end)
                if low < high:
                    name = names[id(parameter)]
                    yield ParameterRange(
                        name, tuple(parameter.shape), low - at, high - low, start + low - begin, self.slices[name]
                    )
                at += parameter.numel()
