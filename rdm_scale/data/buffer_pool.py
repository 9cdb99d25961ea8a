"""Reuse of memory buffers.

Reading and batching take buffers of several MB at a high rate. Memory from the operating system arrives as zeroed pages
that are faulted in on first use, which costs more than filling them, and the C library returns it as soon as it is
freed.
"""

import weakref
from collections import defaultdict, deque
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_SMALLEST_BYTES = 2**16  # smaller buffers are cheap to allocate


class BufferPool:
    """Pool of buffers that return to it when no tensor refers to them any more.

    The pool never shrinks: it holds as much memory as was in use at any one time. It may be used from several threads.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, deque[npt.NDArray[np.uint8]]] = defaultdict(deque)  # by capacity

    @property
    def free_bytes(self) -> int:
        """Bytes of the buffers that are free for reuse."""
        return sum(capacity * len(buffers) for capacity, buffers in list(self._free.items()))

    def take(self, size: int) -> Tensor:
        """uint8 [size] with arbitrary content, not shared with anything else until it and all its views are gone."""
        if size < _SMALLEST_BYTES:
            return torch.empty(size, dtype=torch.uint8)
        capacity = 1 << (size - 1).bit_length()  # pages that are never touched cost nothing
        free = self._free[capacity]
        try:
            buffer = free.pop()
        except IndexError:
            buffer = np.empty(capacity, np.uint8)
        lent = buffer[
            :size
        ]  # kept alive by the tensor's storage alone, so it is freed with the last view of the tensor
        weakref.finalize(lent, free.append, buffer).atexit = False
        return torch.from_numpy(lent)


def as_memoryview(tensor: Tensor) -> memoryview:
    """The memory of a uint8 tensor [size]; the view keeps the memory in use."""
    return cast(memoryview, cast(Any, tensor.numpy()).data)
