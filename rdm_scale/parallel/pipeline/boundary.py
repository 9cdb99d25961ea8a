"""Types of what passes between the chunks of a pipeline.

Shapes: S tokens, B samples, D hidden size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor that a rank is about to receive."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class BoundarySpec(NamedTuple):
    """Shapes and dtypes of `BoundaryTensors`."""

    hidden: TensorSpec
    condition: TensorSpec


class BoundaryTensors(NamedTuple):
    """Forward activations that a chunk passes to the next one or, on the way back, their gradients.

    The conditioning embedding travels with the hidden states: it is 1 / S of their size, and computing it on every
    stage would need the embedders' parameters there, and their gradients summed over the pipeline.
    """

    hidden: Tensor  # [S, B, D]
    condition: Tensor  # [B, D]


class StageInputs(NamedTuple):
    """Inputs of a chunk's forward that other chunks computed; the first chunk has none."""

    boundary: BoundaryTensors | None
    local_skips: Tensors = ()  # of the chunk's V-placement partner, on the same rank, by ascending block


class StageOutputs(NamedTuple):
    """Outputs of a chunk's forward: `boundary` or, of the last chunk, `prediction`."""

    boundary: BoundaryTensors | None = None
    local_skips: Tensors = ()  # for the chunk's V-placement partner: they, and their gradients, stay on the rank
    prediction: Tensor | None = None
