"""The device that a process computes on, and what passes between it and the host without waiting for it."""

import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from rdm_scale.errors import ConfigError


def local_device() -> torch.device:
    """The GPU with this process's local rank (LOCAL_RANK as set by the launcher, else 0), or the CPU without a GPU.

    Raises:
        ConfigError: the launcher started more processes on this node than it has GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= gpus:
        raise ConfigError(
            f"this node has {gpus} GPUs, but the launcher started a process with LOCAL_RANK={local_rank}: start one "
            "rank per GPU, or set CUDA_VISIBLE_DEVICES= (empty) to run on the CPU"
        )
    return torch.device("cuda", local_rank)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy of a tensor of the host on the device; a GPU copies when it comes to it, and the host does not wait."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """Copy of a tensor in host memory, to be read when a later `TimeMark` is reached; the host does not wait for it."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor, non_blocking=True)


class TimeMark:
    """Moment at which the device has done all work that was given to it before.

    A CPU computes at once, so that the moment is now; on a GPU it may be still to come.
    """

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self._now = time.perf_counter()
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Wait until the device is there."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: "TimeMark") -> float:
        """Time between two moments that the device has reached."""
        if self._event is None or earlier._event is None:
            return self._now - earlier._now
        return float(earlier._event.elapsed_time(self._event)) / 1000


def matmul_tflops(device: torch.device, dtype: torch.dtype, size: int = 8192, repeats: int = 10) -> float:
    """TFLOP/s of the fastest of some square matrix products on the device."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    fastest_s = min(_seconds(lambda: a @ b, device) for _ in range(3 + repeats))
    return 2 * size**3 / fastest_s / 1e12


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    began = TimeMark(device)
    work()
    ended = TimeMark(device)
    ended.wait()
    return ended.seconds_since(began)
