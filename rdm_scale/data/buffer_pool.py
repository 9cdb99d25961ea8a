"""Memory that is used again.

Reading and batching take several MB at a time, again and again. The system hands out such memory page by page, each
fetched on its first use and cleared, which costs more than to fill it; the C library gives it back as soon as it is
free.
"""

import weakref
from collections import defaultdict, deque
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_LEAST_BYTES = 2**16  # less is quickly had


class Memory:
    """Hands out memory and takes it back when no tensor uses it any more. It keeps as much as was once in use."""

    def __init__(self) -> None:
        self._spare: defaultdict[int, deque[npt.NDArray[np.uint8]]] = defaultdict(deque)  # by size

    def take(self, size: int) -> Tensor:
        """uint8 [size], of any content. Its memory is its own until it and all its views are gone."""
        if size < _LEAST_BYTES:
            return torch.empty(size, dtype=torch.uint8)
        capacity = 1 << (size - 1).bit_length()  # pages that are never used cost nothing
        spare = self._spare[capacity]
        try:
            block = spare.pop()
        except IndexError:
            block = np.empty(capacity, np.uint8)
        lent = block[:size]  # which the tensor's storage keeps alive, and nothing else does
        weakref.finalize(lent, spare.append, block).atexit = False
        return torch.from_numpy(lent)


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a tensor uint8 [size]; it keeps it from being used again."""
    return cast(memoryview, cast(Any, tensor.numpy()).data)


MEMORY = Memory()  # of this process: training and validation take turns
