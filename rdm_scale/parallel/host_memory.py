"""The memory of the process that runs a rank."""

import contextlib
import ctypes
from collections.abc import Iterator

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_BUILDING, _TRAINING = 2**20, 2**25  # bytes; the latter is where glibc arrives by itself


@contextlib.contextmanager
def returning_freed_memory() -> Iterator[None]:
    """Within, what is freed goes back to the system at once, if it is large.

    glibc keeps freed memory for the next time, and raises the size up to which it does so. In training that saves
    time. While a model is built, whose blocks come and go in sizes that never come again, it would leave holes: ranks
    of the same part of a model were seen to differ by 300 MiB. Other C libraries are left alone.
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
