"""Host memory of the process that runs a rank."""

import contextlib
import ctypes
from collections.abc import Iterator

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_BUILDING, _TRAINING = 2**20, 2**25  # bytes; glibc reaches the latter by itself


@contextlib.contextmanager
def returning_freed_memory() -> Iterator[None]:
    """Context in which large allocations return to the operating system as soon as they are freed.

    glibc keeps freed memory for reuse, up to an allocation size that it raises by itself. That saves time in training.
    While a model is built block by block it fragments the memory: ranks with the same part of a model were seen to
    differ by 300 MiB. Does nothing with other C libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _BUILDING)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _TRAINING)
        mallopt(_M_TRIM_THRESHOLD, 2 * _TRAINING)
