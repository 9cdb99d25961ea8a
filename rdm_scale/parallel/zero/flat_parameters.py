"""Flat parameters: parameters with the same optimizer settings side by side in one buffer, sharded as one tensor.

What is done to flat parameters (gathering, reducing, stepping, publishing) takes as many calls for a thousand blocks as
for one, and the parameters of the model are views that stay where they are.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

_ALIGNMENT = 32  # elements at whose multiples a parameter begins: 64 bytes in bf16, as matrix products want them
LARGEST = 2**30  # elements of a flat parameter, unless a single parameter has more; kernels count to 2^31


class FlatKind(NamedTuple):
    """Properties that all parameters of a flat parameter share, beside their parameter group of the optimizer."""

    bucket: int  # flat parameters of one bucket are gathered, and their gradients reduced, together
    replicated: bool  # every tensor-parallel rank holds the same


class FlatRange(NamedTuple):
    """Elements of one parameter in a part of a flat parameter."""

    parameter: nn.Parameter
    first: int  # element of the flattened parameter
    numel: int
    start: int  # element of the part


@dataclass(frozen=True)
class FlatParameter:
    """Place of parameters in a flat parameter.

    Attributes:
        starts: element of the flat parameter at which each parameter begins.
        numel: of the flat parameter, with the padding between parameters and at the end.
    """

    parameters: tuple[nn.Parameter, ...]
    starts: tuple[int, ...]
    numel: int
    kind: FlatKind

    def views(self, flat: Tensor) -> list[Tensor]:
        """Parameters, or tensors of their shapes, as views of a flat tensor."""
        return [
            flat[start : start + parameter.numel()].view(parameter.shape)
            for parameter, start in zip(self.parameters, self.starts, strict=True)
        ]

    def ranges(self, begin: int, end: int) -> Iterator[FlatRange]:
        """Parameters' elements between two elements of the flat parameter."""
        for parameter, start in zip(self.parameters, self.starts, strict=True):
            low, high = max(start, begin), min(start + parameter.numel(), end)
            if low < high:
                yield FlatRange(parameter, low - start, high - low, low - begin)

    @torch.no_grad()
    def adopt(self, flat: Tensor) -> None:
        """Make the parameters views of a flat tensor, with the values that it holds."""
        for parameter, view in zip(self.parameters, self.views(flat), strict=True):
            parameter.data = view

    @torch.no_grad()
    def flatten(self) -> nn.Parameter:
        """Make a flat tensor, move the parameters' values into it and make them views of it."""
        first = self.parameters[0]
        flat = torch.zeros(self.numel, dtype=first.dtype, device=first.device)
        torch._foreach_copy_(self.views(flat), [parameter.detach() for parameter in self.parameters])
        self.adopt(flat)
        return nn.Parameter(flat)


def flat_parameters(
    parameters: Iterable[nn.Parameter], kind_of: Callable[[nn.Parameter], FlatKind], shards: int
) -> list[FlatParameter]:
    """Lay out the parameters of one parameter group of an optimizer: those of a kind together, in order of bucket.

    Args:
        shards: number of equal parts of every flat parameter.
    """
    kinds: dict[FlatKind, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        kinds[kind_of(parameter)].append(parameter)
    return [_laid_out(some, kind, shards) for kind in sorted(kinds) for some in _limited(kinds[kind], LARGEST)]


def _limited(parameters: Sequence[nn.Parameter], largest: int) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters of at most `largest` elements together, or a larger one alone."""
    some: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if some and size + parameter.numel() > largest:
            yield some
            some, size = [], 0
        some.append(parameter)
        size += _padded(parameter.numel(), _ALIGNMENT)
    if some:
        yield some


def _laid_out(parameters: Sequence[nn.Parameter], kind: FlatKind, shards: int) -> FlatParameter:
    starts, end = [], 0
    for parameter in parameters:
        starts.append(end)
        end += _padded(parameter.numel(), _ALIGNMENT)
    return FlatParameter(tuple(parameters), tuple(starts), _padded(end, shards * _ALIGNMENT), kind)


def _padded(numel: int, multiple: int) -> int:
    return -(-numel // multiple) * multiple
