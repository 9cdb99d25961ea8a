"""Tensor and sequence parallelism: the layer factory whose layers are shared by the ranks of a tensor-parallel group.

Attention's qkv and the MLP's first layer are cut by output features (whole heads stay together), their counterparts by
input features, so that one sum over the ranks a branch makes its output whole (Megatron-LM, arXiv 1909.08053). A long
skip's layer has input features that are whole; it is cut by them, too, each rank taking its part of them. The
modulation, a third of a DiT's parameters, is cut by output features and its small output [B, 6 D] gathered. All else is
the same on every rank. With sequence parallelism each rank keeps S / tp tokens of the stream between the linear layers
(arXiv 2205.05198): the sum becomes a reduce-scatter, and an all-gather comes before each column layer.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rdm_scale.models.layers import LayerFactory, Slice
from rdm_scale.parallel.megatron_adapter import (
    Column,
    Row,
    exchange_tokens_for_features,
    gather_tokens,
    scatter_features,
    scatter_tokens,
)
from rdm_scale.parallel.mesh import Mesh


class TensorParallelLayers(LayerFactory):
    """Layers for one rank of a tensor-parallel group; every cut parameter says by its `slice` what it holds."""

    def __init__(self, mesh: Mesh, sequence: bool) -> None:
        self.mesh, self.sequence = mesh, sequence

    def column(self, inputs: int, outputs: int, whole: bool = False) -> nn.Module:
        return self._cut_by_outputs(Column(inputs, outputs, gather=False, sequence=self.sequence and not whole))

    def gathered(self, inputs: int, outputs: int) -> nn.Module:
        return self._cut_by_outputs(Column(inputs, outputs, gather=True, sequence=False))

    def row(self, inputs: int, outputs: int) -> nn.Module:
        layer = Row(inputs, outputs, sequence=self.sequence)
        layer.weight.slice = Slice(1, self.mesh.tensor_rank, self.mesh.tensor_size)
        return layer

    def split_tokens(self, z_SBD: Tensor) -> Tensor:
        return scatter_tokens(z_SBD) if self.sequence else z_SBD

    def join_tokens(self, z_SBD: Tensor) -> Tensor:
        return gather_tokens(z_SBD) if self.sequence else z_SBD

    def split_features(self, x: Tensor) -> Tensor:
        return exchange_tokens_for_features(x) if self.sequence else scatter_features(x)

    def onto_heads(self, vectors: list[Tensor]) -> list[Tensor]:
        return list(_SumOfGradients.apply(self.mesh.tensor_group, *vectors))

    def onto_tokens(self, vectors: list[Tensor]) -> list[Tensor]:
        return list(_SumOfGradients.apply(self.mesh.tensor_group, *vectors)) if self.sequence else vectors

    def _cut_by_outputs(self, layer: Column) -> Column:
        for parameter in (layer.weight, layer.bias):
            parameter.slice = Slice(0, self.mesh.tensor_rank, self.mesh.tensor_size)
        return layer


class _SumOfGradients(torch.autograd.Function):
    """Identity; in the backward one sum over the ranks of all gradients together.

    megatron-core's copy_to_tensor_model_parallel_region does not serve: it sums each gradient on its own, in place
    even where autograd shares it with others, and gives an expanded one back as it came.
    """

    @staticmethod
    def forward(ctx: Any, group: Any, *vectors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(vector.view_as(vector) for vector in vectors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat = torch.cat([gradient.float().flatten() for gradient in gradients])
        dist.all_reduce(flat, group=ctx.group)
        parts = flat.split([gradient.numel() for gradient in gradients])
        return None, *(p.view(g.shape).to(g.dtype) for p, g in zip(parts, gradients, strict=True))
