"""Products and collectives of tensor parallelism as operators that torch.compile takes whole.

megatron-core's layers keep the weights (parallel/megatron_adapter.py), but Dynamo cannot trace their computation: their
backwards start collectives that run beside a product. Here each layer is one operator, and its gradient another, which
overlaps the same collectives with the same products. Activation checkpointing keeps their outputs, so that nothing is
communicated twice.

`group` is the name of a process group, `size` the number of its ranks, because operators take no objects.

Shapes: S tokens, B samples, I input features, O output features; dimensions that are sharded count this rank's part.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.library import Library, register_autograd, register_fake

if not callable(getattr(distributed_c10d, "_resolve_process_group", None)):
    raise ImportError(f"torch {torch.__version__} finds no process group by its name; tested with torch 2.11 to 2.13")

_LIBRARY = Library("rdm_scale", "DEF")
_TAGS = (torch.Tag.needs_fixed_stride_order,)  # inductor must not lay out their inputs anew

Operator = Callable[..., Any]


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Operator]:
    """Make a function an operator of the library; `fake` gives the shapes of its outputs."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=_TAGS)

    def register(function: Callable[..., Any]) -> Operator:
        for device in ("CPU", "CUDA"):
            _LIBRARY.impl(name, function, device)
        register_fake(f"rdm_scale::{name}", fake, lib=_LIBRARY)
        operator: Operator = getattr(torch.ops.rdm_scale, name).default
        return operator

    return register


def _group(name: str) -> dist.ProcessGroup:
    resolve: Callable[[Any], dist.ProcessGroup] = distributed_c10d._resolve_process_group
    return resolve(name)


def _rows(x: Tensor) -> Tensor:
    return x.contiguous().flatten(0, -2)


def _like(x: Tensor, *shape: Any) -> Tensor:
    return x.new_empty(shape or x.shape)


# Collectives.


@_operator("all_reduce_sum(Tensor x, str group) -> Tensor", lambda x, group: _like(x))
def all_reduce_sum(x: Tensor, group: str) -> Tensor:
    """Sum over the ranks; has no gradient of its own."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=_group(group))
    return total


@_operator(
    "gather_first(Tensor x, str group, int size) -> Tensor",
    lambda x, group, size: _like(x, x.shape[0] * size, *x.shape[1:]),
)
def gather_first(x: Tensor, group: str, size: int) -> Tensor:
    """All-gather along the first dimension. All ranks compute the same with it: the gradient is this rank's part."""
    whole = _like(x, x.shape[0] * size, *x.shape[1:])
    dist.all_gather_into_tensor(whole, x.contiguous(), group=_group(group))
    return whole


@_operator(
    "part_first(Tensor x, str group, int size) -> Tensor",
    lambda x, group, size: _like(x, x.shape[0] // size, *x.shape[1:]),
)
def part_first(x: Tensor, group: str, size: int) -> Tensor:
    """This rank's part along the first dimension; the gradient is all-gathered."""
    return x.chunk(size)[_group(group).rank()].clone(memory_format=torch.contiguous_format)


@_operator(
    "gather_last(Tensor x, str group, int size) -> Tensor",
    lambda x, group, size: _like(x, *x.shape[:-1], x.shape[-1] * size),
)
def gather_last(x: Tensor, group: str, size: int) -> Tensor:
    """All-gather along the last dimension. All ranks compute the same with it: the gradient is this rank's part."""
    return torch.cat(gather_first(x, group, size).chunk(size), dim=-1)


@_operator(
    "part_last(Tensor x, str group, int size) -> Tensor",
    lambda x, group, size: _like(x, *x.shape[:-1], x.shape[-1] // size),
)
def part_last(x: Tensor, group: str, size: int) -> Tensor:
    """This rank's part along the last dimension; the gradient is all-gathered."""
    return x.chunk(size, -1)[_group(group).rank()].clone(memory_format=torch.contiguous_format)


@_operator("exchange(Tensor x, str group) -> Tensor", lambda x, group: _like(x))
def exchange(x: Tensor, group: str) -> Tensor:
    """All-to-all: the i-th element of the first dimension goes to rank i. Its gradient is the same."""
    x = x.contiguous()
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=_group(group))
    return received


def _set_gradient(name: str, gradient: Operator) -> None:
    """Declare that the gradient of a collective is another one, with the same arguments."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.arguments = inputs[1:]

    def backward(ctx: Any, received: Tensor) -> tuple[Any, ...]:
        return gradient(received, *ctx.arguments), *[None] * len(ctx.arguments)

    register_autograd(f"rdm_scale::{name}", backward, setup_context=setup, lib=_LIBRARY)


_set_gradient("gather_first", part_first)
_set_gradient("part_first", gather_first)
_set_gradient("gather_last", part_last)
_set_gradient("part_last", gather_last)
_set_gradient("exchange", exchange)

# Layers. With `sequence` a column layer's input and a row layer's output hold this rank's tokens.


@_operator(
    "column(Tensor x, Tensor weight, Tensor bias, str group, int size, bool sequence) -> Tensor",
    lambda x, weight, bias, group, size, sequence: _like(
        x, x.shape[0] * (size if sequence else 1), *x.shape[1:-1], weight.shape[0]
    ),
)
def column(x_SBI: Tensor, weight_OI: Tensor, bias_O: Tensor, group: str, size: int, sequence: bool) -> Tensor:
    """Product of all tokens with this rank's output features, plus the bias."""
    x_SBI = gather_first(x_SBI, group, size) if sequence else x_SBI
    return torch.addmm(bias_O, _rows(x_SBI), weight_OI.t()).unflatten(0, x_SBI.shape[:-1])


@_operator(
    "column_backward(Tensor gradient, Tensor x, Tensor weight, str group, int size, bool sequence)"
    " -> (Tensor, Tensor, Tensor)",
    lambda gradient, x, weight, group, size, sequence: (_like(x), _like(weight), _like(weight, weight.shape[0])),
)
def column_backward(
    gradient_SBO: Tensor, x_SBI: Tensor, weight_OI: Tensor, group: str, size: int, sequence: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias.

    The inputs are gathered while the input's gradient is computed, which is summed while the weight's is computed.
    """
    ranks, rows, inputs_SBI, waits = _group(group), _rows(gradient_SBO), x_SBI.contiguous(), []
    if sequence:
        inputs_SBI = _like(x_SBI, x_SBI.shape[0] * size, *x_SBI.shape[1:])
        waits.append(dist.all_gather_into_tensor(inputs_SBI, x_SBI.contiguous(), group=ranks, async_op=True))
    sums_SBI = (rows @ weight_OI).unflatten(0, inputs_SBI.shape[:-1])
    for wait in waits:
        wait.wait()
    if sequence:
        of_input = _like(x_SBI)
        reduction = dist.reduce_scatter_tensor(of_input, sums_SBI, group=ranks, async_op=True)
    else:
        of_input = sums_SBI
        reduction = dist.all_reduce(of_input, group=ranks, async_op=True)
    of_weight, of_bias = rows.t() @ _rows(inputs_SBI), rows.sum(0)
    reduction.wait()
    return of_input, of_weight, of_bias


@_operator(
    "row(Tensor x, Tensor weight, str group, int size, bool sequence) -> Tensor",
    lambda x, weight, group, size, sequence: _like(
        x, x.shape[0] // (size if sequence else 1), *x.shape[1:-1], weight.shape[0]
    ),
)
def row(x_SBI: Tensor, weight_OI: Tensor, group: str, size: int, sequence: bool) -> Tensor:
    """Product with this rank's input features, summed over the ranks."""
    product_SBO = (_rows(x_SBI) @ weight_OI.t()).unflatten(0, x_SBI.shape[:-1])
    if not sequence:
        dist.all_reduce(product_SBO, group=_group(group))
        return product_SBO
    own_SBO = _like(product_SBO, product_SBO.shape[0] // size, *product_SBO.shape[1:])
    dist.reduce_scatter_tensor(own_SBO, product_SBO, group=_group(group))
    return own_SBO


@_operator(
    "row_backward(Tensor gradient, Tensor x, Tensor weight, str group, int size, bool sequence) -> (Tensor, Tensor)",
    lambda gradient, x, weight, group, size, sequence: (_like(x), _like(weight)),
)
def row_backward(
    gradient_SBO: Tensor, x_SBI: Tensor, weight_OI: Tensor, group: str, size: int, sequence: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of input and weight."""
    rows = _rows(gather_first(gradient_SBO, group, size) if sequence else gradient_SBO)
    return (rows @ weight_OI).unflatten(0, x_SBI.shape[:-1]), rows.t() @ _rows(x_SBI)


def _save_column(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *ctx.arguments = inputs
    ctx.save_for_backward(x, weight)


def _save_row(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *ctx.arguments = inputs
    ctx.save_for_backward(x, weight)


def _column_gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return *column_backward(gradient, *ctx.saved_tensors, *ctx.arguments), None, None, None


def _row_gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return *row_backward(gradient, *ctx.saved_tensors, *ctx.arguments), None, None, None


register_autograd("rdm_scale::column", _column_gradients, setup_context=_save_column, lib=_LIBRARY)
register_autograd("rdm_scale::row", _row_gradients, setup_context=_save_row, lib=_LIBRARY)
