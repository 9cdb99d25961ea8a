"""Where a model's linear layers come from.

A model asks a `LayerFactory` for its layers and says how each may be split; it never learns of ranks. This
factory makes plain layers; tensor parallelism passes one that makes sharded layers of the same logical shapes.
"""

from torch import nn


class LayerFactory:
    """Plain, unsharded linear layers. All have a bias and logical weight shape [outputs, inputs]."""

    def column(self, inputs: int, outputs: int) -> nn.Module:
        """Linear layer whose output features may be split over ranks (feeds a `row` layer)."""
        return nn.Linear(inputs, outputs)

    def row(self, inputs: int, outputs: int) -> nn.Module:
        """Linear layer whose input features may be split over ranks; the output is whole."""
        return nn.Linear(inputs, outputs)

    def gathered(self, inputs: int, outputs: int) -> nn.Module:
        """Linear layer whose weight may be split over ranks, with whole inputs and outputs."""
        return nn.Linear(inputs, outputs)
