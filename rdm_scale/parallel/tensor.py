"""Tensor and sequence parallelism: the layer factory whose layers are sharded over a tensor-parallel group.

Attention's qkv and the MLP's first layer are sharded by output features (a head stays on one rank), their counterparts
by input features, so that one all-reduce for each branch suffices (Megatron-LM, arXiv 1909.08053). A long skip's layer
is sharded by input features, too, although its input is not: each rank takes its slice of the features. The adaLN
modulation, a third of a DiT's parameters, is sharded by output features and its small output [B, 6 D] all-gathered.
Everything else is replicated. With sequence parallelism each rank keeps S / tp tokens of the hidden states between the
linear layers (arXiv 2205.05198): the all-reduce becomes a reduce-scatter, and an all-gather precedes each column layer.

Shapes: S tokens, B samples, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn

from rdm_scale.models.layers import LayerFactory, Slice
from rdm_scale.parallel import tensor_operators as operators
from rdm_scale.parallel.megatron_adapter import Column, Row, tensor_parallel_ranks
from rdm_scale.parallel.mesh import Mesh


class TensorParallelLayers(LayerFactory):
    """Layers for one rank of a tensor-parallel group; those with sharded parameters list their `slices`."""

    def __init__(self, mesh: Mesh, sequence: bool) -> None:
        self.mesh, self.sequence = mesh, sequence
        self.ranks = tensor_parallel_ranks()

    def column(self, inputs: int, outputs: int, replicated_input: bool = False) -> nn.Module:
        sequence = self.sequence and not replicated_input
        return Column(inputs, outputs, gather=False, sequence=sequence, slices=self._column_slices())

    def gathered(self, inputs: int, outputs: int) -> nn.Module:
        return Column(inputs, outputs, gather=True, sequence=False, slices=self._column_slices())

    def row(self, inputs: int, outputs: int) -> nn.Module:
        return Row(inputs, outputs, sequence=self.sequence, slices={"weight": self._slice(1)})

    def split_tokens(self, z_SBD: Tensor) -> Tensor:
        return operators.part_first(z_SBD, *self.ranks) if self.sequence else z_SBD

    def join_tokens(self, z_SBD: Tensor) -> Tensor:
        return operators.gather_first(z_SBD, *self.ranks) if self.sequence else z_SBD

    def split_features(self, x: Tensor) -> Tensor:
        if not self.sequence:
            return operators.part_last(x, *self.ranks)
        by_rank = x.unflatten(2, (self.ranks.size, -1)).permute(2, 0, 1, 3)  # slices of the features first
        return operators.exchange(by_rank, self.ranks.group).flatten(0, 1)

    def sum_gradients_over_heads(self, tensors: list[Tensor]) -> list[Tensor]:
        return list(_GradientAllReduce.apply(self.ranks.group, *tensors))

    def sum_gradients_over_tokens(self, tensors: list[Tensor]) -> list[Tensor]:
        return list(_GradientAllReduce.apply(self.ranks.group, *tensors)) if self.sequence else tensors

    def _column_slices(self) -> dict[str, Slice]:
        return {"weight": self._slice(0), "bias": self._slice(0)}

    def _slice(self, dim: int) -> Slice:
        return Slice(dim, self.mesh.tensor_rank, self.mesh.tensor_size)


class _GradientAllReduce(torch.autograd.Function):
    """Identity; in the backward a single all-reduce of all gradients in fp32.

    megatron-core's copy_to_tensor_model_parallel_region cannot be used: it reduces each gradient separately, in place
    even where autograd shares it with others, and returns an expanded gradient unreduced.
    """

    @staticmethod
    def forward(ctx: Any, group: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat = torch.cat([gradient.float().flatten() for gradient in gradients])
        parts = operators.all_reduce_sum(flat, ctx.group).split([gradient.numel() for gradient in gradients])
        return None, *(p.view(g.shape).to(g.dtype) for p, g in zip(parts, gradients, strict=True))
