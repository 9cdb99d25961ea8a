"""Layer factory of the models: the only place where a model touches parallelism.

A model asks a `LayerFactory` for its layers and states how each may be sharded; it knows nothing of ranks. The factory
here makes plain layers. parallel/tensor.py has one for tensor parallelism, which makes sharded layers of the same
logical shapes and, with sequence parallelism, keeps a slice of the tokens on each rank.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Slice:
    """Slice `index` of `count` equal slices of a logical tensor, cut along `dim`."""

    dim: int
    index: int
    count: int

    def logical_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the logical tensor of a parameter of `shape`."""
        return tuple(n * self.count if d == self.dim else n for d, n in enumerate(shape))

    def offset(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Position in its logical tensor at which a parameter of `shape` begins."""
        return tuple(n * self.index if d == self.dim else 0 for d, n in enumerate(shape))

    def of(self, logical: Tensor) -> Tensor:
        """View of this slice of a logical tensor."""
        return logical.chunk(self.count, self.dim)[self.index]


UNSHARDED = Slice(0, 0, 1)


def parameter_slices(module: nn.Module) -> dict[str, Slice]:
    """Slices of their logical tensors that a module's parameters hold, by qualified name.

    A layer with sharded parameters lists their slices in an attribute `slices`; all others are `UNSHARDED`.
    """
    slices = {name: UNSHARDED for name, _ in module.named_parameters()}
    for prefix, layer in module.named_modules():
        for name, part in getattr(layer, "slices", {}).items():
            slices[f"{prefix}.{name}" if prefix else name] = part
    return slices


class Linear(nn.Linear):
    """Linear layer over flattened rows: always a single matrix product that includes the bias (addmm).

    Under ZeRO-3 DeepSpeed replaces F.linear by a version that, for more than two dimensions, adds the bias to the
    product in place. Selective activation checkpointing keeps products and would add the bias to them a second time.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.flatten(0, -2), self.weight, self.bias).unflatten(0, input.shape[:-1])


class RowLinear(Linear):
    """Linear layer that leaves its bias to the caller."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.flatten(0, -2), self.weight).unflatten(0, input.shape[:-1])


class LayerFactory:
    """Plain layers, nothing sharded. All linear layers have a bias and the logical weight shape [outputs, inputs]."""

    def column(self, inputs: int, outputs: int, replicated_input: bool = False) -> nn.Module:
        """Make a linear layer whose output features may be sharded; it feeds a `row` layer.

        Its input holds the tokens of this rank or, with `replicated_input`, is the same on every rank.
        """
        return Linear(inputs, outputs)

    def row(self, inputs: int, outputs: int) -> nn.Module:
        """Make a linear layer whose input features may be sharded.

        Its output is unsharded and leaves out the bias: the caller adds it once, after the sum over the ranks.
        """
        return RowLinear(inputs, outputs)

    def gathered(self, inputs: int, outputs: int) -> nn.Module:
        """Make a linear layer whose weight may be sharded, with unsharded inputs and outputs."""
        return Linear(inputs, outputs)

    def split_tokens(self, z_SBD: Tensor) -> Tensor:
        """Take the tokens of this rank from those of all ranks."""
        return z_SBD

    def join_tokens(self, z_SBD: Tensor) -> Tensor:
        """Gather the tokens of all ranks from those of each."""
        return z_SBD

    def split_features(self, x: Tensor) -> Tensor:
        """Make the input of this rank's slice of a `row` layer.

        That is a slice of the features of all tokens, given all features of this rank's tokens.
        """
        return x

    def sum_gradients_over_heads(self, tensors: list[Tensor]) -> list[Tensor]:
        """Identity for parameters that are the same on every rank and act on this rank's attention heads.

        In the backward an all-reduce of their gradients, which are sums over all heads.
        """
        return tensors

    def sum_gradients_over_tokens(self, tensors: list[Tensor]) -> list[Tensor]:
        """Identity for tensors that are the same on every rank and act on this rank's tokens.

        Under sequence parallelism, in the backward an all-reduce of their gradients, which are sums over all tokens.
        """
        return tensors
