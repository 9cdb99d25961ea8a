"""Processes that must not outlive the one that started them."""

import ctypes
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def parent_death_setter() -> Callable[[], None] | None:
    """Find the function with which a process asks the kernel to kill it when its parent dies.

    Call this before a fork and the result after it, where few functions are safe to call, `dlopen` not among them.

    Returns:
        The function, for instance as `preexec_fn` of subprocess.Popen; None where the kernel is not Linux.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
