"""Where a model's linear layers come from.

A model asks a `LayerFactory` for its layers and says how each may be split; it never learns of ranks. This
factory makes plain layers; tensor parallelism passes one that makes sharded layers of the same logical shapes.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """nn.Linear over rows: always one matrix product that takes the bias with it.

    Under ZeRO-3 DeepSpeed replaces F.linear by a version that, for more than two dimensions, adds the bias in place to
    the product. Selective recompute keeps products, and would add it to them a second time.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.flatten(0, -2), self.weight, self.bias).unflatten(0, input.shape[:-1])


class LayerFactory:
    """Plain, unsharded linear layers. All have a bias and logical weight shape [outputs, inputs]."""

    def column(self, inputs: int, outputs: int) -> nn.Module:
        """Linear layer whose output features may be split over ranks (feeds a `row` layer)."""
        return Linear(inputs, outputs)

    def row(self, inputs: int, outputs: int) -> nn.Module:
        """Linear layer whose input features may be split over ranks; the output is whole."""
        return Linear(inputs, outputs)

    def gathered(self, inputs: int, outputs: int) -> nn.Module:
        """Linear layer whose weight may be split over ranks, with whole inputs and outputs."""
        return Linear(inputs, outputs)
