"""Where a model's layers come from, and where its work may be split over ranks.

A model asks a `LayerFactory` for its layers and says how each may be split; it never learns of ranks. This factory
makes plain layers and splits nothing; tensor parallelism passes one that makes sharded layers of the same logical
shapes and that, with sequence parallelism, keeps a part of the tokens only (parallel/tensor.py).
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Slice:
    """A parameter that holds part `index` of `count` equal parts of its logical tensor, cut along `dim`."""

    dim: int
    index: int
    count: int

    def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Logical shape of a parameter of `shape`."""
        return tuple(n * self.count if d == self.dim else n for d, n in enumerate(shape))

    def offset(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Where in its logical tensor a parameter of `shape` begins."""
        return tuple(n * self.index if d == self.dim else 0 for d, n in enumerate(shape))

    def of(self, whole: Tensor) -> Tensor:
        """This part of a logical tensor (a view)."""
        return whole.chunk(self.count, self.dim)[self.index]


WHOLE = Slice(0, 0, 1)


def slice_of(parameter: Any) -> Slice:
    """Which part of its logical tensor a parameter holds; whoever shards one sets its `slice`."""
    return getattr(parameter, "slice", WHOLE)


class Linear(nn.Linear):
    """nn.Linear over rows: always one matrix product that takes the bias with it.

    Under ZeRO-3 by block DeepSpeed replaces F.linear by a version that, for more than two dimensions, adds the bias in
    place to the product. Selective recompute keeps products, and would add it to them a second time.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.flatten(0, -2), self.weight, self.bias).unflatten(0, input.shape[:-1])


class RowLinear(Linear):
    """A linear layer that leaves its bias to the caller."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.flatten(0, -2), self.weight).unflatten(0, input.shape[:-1])


class LayerFactory:
    """Plain layers, nothing split. All linear layers have a bias and the logical weight shape [outputs, inputs]."""

    def column(self, inputs: int, outputs: int, whole: bool = False) -> nn.Module:
        """Linear layer whose output features may be split over ranks (feeds a `row` layer). Its input is the tokens
        that this rank works on or, if `whole`, the same on every rank."""
        return Linear(inputs, outputs)

    def row(self, inputs: int, outputs: int) -> nn.Module:
        """Linear layer whose input features may be split over ranks; the output is whole, without the bias: that is
        the caller's to add, once, after the ranks' products have been summed."""
        return RowLinear(inputs, outputs)

    def gathered(self, inputs: int, outputs: int) -> nn.Module:
        """Linear layer whose weight may be split over ranks, with whole inputs and outputs."""
        return Linear(inputs, outputs)

    def split_tokens(self, z_SBD: Tensor) -> Tensor:
        """The tokens that this rank works on, out of all."""
        return z_SBD

    def join_tokens(self, z_SBD: Tensor) -> Tensor:
        """All tokens, out of those that each rank works on."""
        return z_SBD

    def split_features(self, x: Tensor) -> Tensor:
        """Of features of the tokens that this rank works on, those of all tokens that feed its part of a `row`."""
        return x

    def onto_heads(self, vectors: list[Tensor]) -> list[Tensor]:
        """Parameters that are the same on every rank, about to act on the attention heads of this one: their gradients
        are sums over all heads, wherever those are."""
        return vectors

    def onto_tokens(self, vectors: list[Tensor]) -> list[Tensor]:
        """Tensors that are the same on every rank, about to act on the tokens of this one: their gradients are sums
        over all tokens, wherever those are."""
        return vectors
