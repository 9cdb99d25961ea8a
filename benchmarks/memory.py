"""What a process keeps in memory: tensors by kind, and the peak of the process."""

import contextlib
import ctypes
import gc
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

KINDS = ("parameters", "gradients", "optimizer", "average", "other")
_M_MMAP_THRESHOLD = -3  # malloc.h


@contextlib.contextmanager
def looking_at_the_end(model: Any, ema: Any, before: set[int], found: list[dict[str, int]]) -> Iterator[None]:
    """Within, finds out what is alive after the last backward of a step."""
    accumulating = model.zero.accumulating

    @contextlib.contextmanager
    def watched() -> Iterator[None]:
        with accumulating():
            yield
            found.append(live_by_kind(model, ema, before))

    model.zero.accumulating = watched
    yield
    model.zero.accumulating = accumulating


def live_by_kind(model: Any, ema: Any, before: set[int]) -> dict[str, int]:
    zero = model.zero
    optimizer = [*zero.masters, *itertools.chain(*zero.moments().values())]
    kind_of = {address(t): "optimizer" for t in optimizer} | {address(t): "average" for t in ema.flats}
    for parameter in zero.parameters:
        kind_of[address(parameter)] = "parameters"
        if hasattr(parameter, "ds_tensor"):
            kind_of[address(parameter.ds_tensor)] = "parameters"
        for name in ("grad", "grad_accum"):  # DeepSpeed's below stage 3
            if getattr(parameter, name, None) is not None:
                kind_of[address(getattr(parameter, name))] = "gradients"
    kind_of |= {address(t): "gradients" for t in partitioned_gradients(zero.optimizer.raw)}
    sizes = dict.fromkeys(KINDS, 0)
    for storage, size in live_storages():
        if storage not in before:
            sizes[kind_of.get(storage, "other")] += size
    return sizes


def partitioned_gradients(zero: Any) -> list[Tensor]:
    """Where DeepSpeed keeps what it has reduced: stage 3, and stage 2."""
    groups = [[getattr(zero, "grad_partitions_flat_buffer", None)]]
    for name in ("averaged_gradients", "all_grad_tensors"):
        found = getattr(zero, name, None)
        groups += found.values() if isinstance(found, dict) else []
    return [t for group in groups if group is not None for t in group if t is not None]


def live_storages() -> set[tuple[int, int]]:
    """(address, bytes) of the memory of all tensors that Python reaches."""
    gc.collect()
    found = [o for o in gc.get_objects() if isinstance(o, Tensor) and not o.is_meta]
    found += [t.grad for t in found if t.is_leaf and t.requires_grad and t.grad is not None]
    return {(address(t), t.untyped_storage().nbytes()) for t in found if t.untyped_storage().nbytes()}


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def rss() -> dict[str, int]:
    """Bytes of this process's memory, from /proc."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0].rstrip(":"): 1024 * int(line[1]) for line in lines if line[-1] == "kB"}


def peak_since(before: dict[str, int]) -> int:
    """Growth of memory up to its peak, without pages of files."""
    now = rss()
    return (now["VmHWM"] - now["RssFile"]) - (before["VmRSS"] - before["RssFile"])


def forget_peak() -> None:
    """The peak counts from here."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def give_memory_back() -> None:
    """Makes large blocks mappings of their own, which the kernel gets back when they are freed. To be called before
    anything is allocated: else a freed block stays with the process, which finds others for what comes next, and the
    peak is that of the allocator's habits (by block 306 MiB, where tensors never take 90)."""
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**16)
