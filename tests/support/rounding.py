"""Comparison of float32 results up to rounding, within bounds that hold on every processor."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

FACTOR = 4  # between the largest rounding errors of two evaluations that differ only in the order of their sums
_randn = torch.randn


class Evaluations(NamedTuple):
    """Values of one function of one input, computed in float32 and in float64."""

    rounded: Tensor
    exact: Tensor


@torch.no_grad()
def evaluate(model: torch.nn.Module, function: Callable[[Any, Tensor], Tensor], x: Tensor) -> Evaluations:
    """`function(model, x)` with the model and x as they are, in float32, and with copies of both in float64."""
    with mock.patch.object(torch, "randn", _float32_noise):
        return Evaluations(function(model, x), function(copy.deepcopy(model).double(), x.double()))


def assert_close_up_to_rounding(found: Tensor, expected: Evaluations) -> None:
    """Fail unless `found` is another float32 evaluation of the same function.

    Kernels choose the order of their sums by instruction set, memory alignment and batch size. The rounding error of
    a sum of n products in another order is of the same size, about sqrt(n) * 2^-24 of its terms (Higham, Accuracy and
    Stability of Numerical Algorithms, chapter 4), and later layers amplify it. That size depends on the model and its
    input, so no constant such as 1e-5 suits all of them. It is measured instead, on the processor at hand, as the
    largest error of the float32 evaluation against the float64 one, whose own error is smaller by 2^29.
    """
    found, (rounded, exact) = found.double(), expected
    if found.shape != exact.shape:
        raise AssertionError(f"the shape is {list(found.shape)}, expected {list(exact.shape)}")
    rounding = (rounded.double() - exact).abs().max()
    bound = FACTOR * rounding + torch.finfo(torch.float32).eps * exact.abs()  # the latter: representing the result
    error = (found - exact).abs()
    if not bool((error <= bound).all()):
        raise AssertionError(
            f"{int((error > bound).sum())} of {error.numel()} elements differ by more than rounding: by up to "
            f"{error.max():.2e}, where float32 itself is wrong by {rounding:.2e}"
        )


def _float32_noise(*size: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """`torch.randn` with the same values in every element type, for decoders that inject noise."""
    return _randn(*size, **options).to(dtype or torch.float32)
