"""What a process keeps in memory: tensors by kind, and the peak of the process."""

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from rdm_scale.parallel.parallel_model import ParallelModel

KINDS = ("parameters", "gradients", "optimizer", "average", "other")
_M_MMAP_THRESHOLD = -3  # malloc.h


@contextlib.contextmanager
def looking_at_the_end(model: ParallelModel, before: set[int], found: list[dict[str, int]]) -> Iterator[None]:
    """Within, finds out what is alive after the last backward of a step."""
    hook = model.on_action

    def look(action: object) -> None:
        if action is None:
            found.append(live_by_kind(model, before))

    model.on_action = look
    yield
    model.on_action = hook


def live_by_kind(model: ParallelModel, before: set[int]) -> dict[str, int]:
    kind_of = {address(t): kind for kind, tensors in model.tensors_by_kind().items() for t in tensors}
    sizes = dict.fromkeys(KINDS, 0)
    for storage, size in live_storages():
        if storage not in before:
            sizes[kind_of.get(storage, "other")] += size
    return sizes


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
