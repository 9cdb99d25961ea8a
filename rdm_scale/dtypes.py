"""Floating-point element types: their names in configurations, manifests and safetensors headers, and their sizes.

PyTorch is imported only when a `torch.dtype` is asked for: layouts are costed and manifests checked without it.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ElementType:
    """One floating-point type.

    Attributes:
        name: in PyTorch, NumPy and manifests of latents.
        safetensors: in the header of a safetensors file.
        bytes: size of one element.
    """

    name: str
    safetensors: str
    bytes: int

    @cached_property
    def torch(self) -> "torch.dtype":
        """The `torch.dtype` of the same name."""
        import torch

        dtype: torch.dtype = getattr(torch, self.name)
        return dtype


FLOAT64 = ElementType("float64", "F64", 8)
FLOAT32 = ElementType("float32", "F32", 4)
FLOAT16 = ElementType("float16", "F16", 2)
BFLOAT16 = ElementType("bfloat16", "BF16", 2)

# By the names of `train.precision`, `train.residual_dtype` and the tools' `--dtype`.
PRECISIONS = {"fp32": FLOAT32, "bf16": BFLOAT16}
# By the names in a manifest: the types in which latents and captions are stored.
STORED_DTYPES = {dtype.name: dtype for dtype in (FLOAT32, FLOAT16, BFLOAT16)}
# By the names in a safetensors header.
SAFETENSORS_DTYPES = {dtype.safetensors: dtype for dtype in (FLOAT64, FLOAT32, FLOAT16, BFLOAT16)}
