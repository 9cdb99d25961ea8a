"""Range reads from the files of a checkpoint: few and large, concurrent, and verified block by block.

Shapes: N dimensions, K copies.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from rdm_scale.checkpoint.format.index import IndexedFile
from rdm_scale.checkpoint.format.overlap import CopyPlan
from rdm_scale.checkpoint.format.slices import Ints
from rdm_scale.errors import CheckpointError

# Most blocks that a read fetches at once, unless a strided copy is larger. Local reads cost little, and one block stays
# in the processor's cache.
REMOTE_WINDOW_BLOCKS, LOCAL_WINDOW_BLOCKS = 8, 1
_REMOTE_THREADS, _LOCAL_THREADS = 4, 2  # concurrent reads; two cores saturate memory and local disks


class ThreadBuffer(threading.local):
    """A reusable buffer per thread: allocating memory takes longer than a read."""

    _buffer = bytearray()

    def take(self, size: int) -> memoryview:
        """Return a view of `size` bytes, valid until the thread's next call."""
        if len(self._buffer) < size:
            self._buffer = bytearray(size)
        return memoryview(self._buffer)[:size]


class FilePositions(NamedTuple):
    """Position of the source of each copy of a plan."""

    file: Ints  # [K], number of the file
    byte: Ints  # [K], position within the state entry


class RangeReader:
    """Executor of copies from the files of a checkpoint. Threads and their buffers are kept between calls.

    Args:
        files: the files to read; all local or all remote.
        window_blocks: most blocks that a read fetches at once; depends on the storage by default.
    """

    def __init__(self, files: Sequence[IndexedFile], window_blocks: int | None = None) -> None:
        self._files = files
        local = all(file.data.is_local for file in files)
        self._block_bytes = files[0].block_bytes
        blocks = window_blocks or (LOCAL_WINDOW_BLOCKS if local else REMOTE_WINDOW_BLOCKS)
        self._window_bytes = blocks * self._block_bytes
        self._thread_count = _LOCAL_THREADS if local else _REMOTE_THREADS
        self._buffer = ThreadBuffer()
        self._threads = ThreadPoolExecutor(self._thread_count)

    def execute(self, plan: CopyPlan, sources: FilePositions, entry: str, target: NDArray[np.float32]) -> None:
        """Copy one state entry into `target`.

        Args:
            plan: the copies.
            sources: position of each copy's source; `plan.source` is not used.
            entry: name of the state entry.
            target: flat buffer to fill.

        Raises:
            CheckpointError: a file lacks the state entry, cannot be read, or its checksum differs; names file and
                bytes.
        """
        reads = iter(list(_plan_reads(plan, sources, self._window_bytes, self._block_bytes)))
        first_blocks = {i: self._files[i].first_block(entry) for i in np.unique(sources.file).tolist()}

        def work() -> None:
            try:
                for read in reads:  # shared by all threads
                    self._read(read, first_blocks[read.file], plan, target)
            except BaseException:
                deque(reads, maxlen=0)  # keep the other threads from starting another read
                raise

        threads, _ = wait([self._threads.submit(work) for _ in range(self._thread_count)])
        for thread in threads:
            thread.result()

    def _read(self, read: "_BlockRead", first_block: int, plan: CopyPlan, target: NDArray[np.float32]) -> None:
        file, k = self._files[read.file], read.copies[0]
        numbers = range(first_block + read.first, first_block + read.last + 1)
        size = file.block_range(numbers[-1])[1] - file.block_range(numbers[0])[0]
        if len(read.copies) == 1 and plan.contiguous[k] and read.ends[0] - read.begins[0] == size:
            view = target[plan.target[k] + read.skipped[0] :].view(np.uint8).data
            read_blocks(file, numbers, view[:size])  # every byte is needed, in this order
        else:
            content = self._buffer.take(size)
            read_blocks(file, numbers, content)
            _copy(plan, read, content, self._block_bytes, target)


@dataclass(frozen=True)
class _BlockRead:
    """A read of the blocks `first` to `last` of a state entry, and the copies from them."""

    file: int
    first: int
    last: int
    copies: Ints  # [K], numbers of the copies in the plan
    skipped: Ints  # [K], elements of a contiguous copy that earlier reads cover
    begins: Ints  # [K], bytes from the start of the state entry
    ends: Ints  # [K]


def _plan_reads(plan: CopyPlan, sources: FilePositions, window_bytes: int, block_bytes: int) -> Iterator[_BlockRead]:
    """Group copies that begin in the same window of a state entry and are close to each other into one read.

    Contiguous copies are split at the ends of windows; strided copies are not split.
    """
    owner, position = sources
    end = position + 4 * plan.span
    window = position // window_bytes
    parts = np.where(plan.contiguous, (end - 1) // window_bytes - window + 1, 1)
    which = np.repeat(np.arange(len(parts)), parts)
    part = np.arange(len(which)) - np.repeat(np.cumsum(parts) - parts, parts)
    window = window[which] + part
    strided = ~plan.contiguous[which]
    begins = np.where(strided | (part == 0), position[which], window * window_bytes)
    ends = np.where(strided, end[which], np.minimum(end[which], (window + 1) * window_bytes))
    skipped = (begins - position[which]) // 4

    order = np.lexsort((begins, window, owner[which]))
    which, begins, ends, skipped, window = (a[order] for a in (which, begins, ends, skipped, window))
    distant = begins[1:] // block_bytes > ends[:-1] // block_bytes + 1
    new = distant | (window[1:] != window[:-1]) | (np.diff(owner[which]) != 0)
    group = np.flatnonzero(np.append(True, new)[: len(which)])
    firsts = begins[group] // block_bytes
    lasts = (np.maximum.reduceat(ends, group) - 1) // block_bytes if len(group) else group
    bounds = zip(owner[which[group]].tolist(), firsts.tolist(), lasts.tolist(), strict=True)
    splits = [*group.tolist(), len(which)]
    for (file, first, last), a, b in zip(bounds, splits, splits[1:], strict=False):
        yield _BlockRead(file, first, last, which[a:b], skipped[a:b], begins[a:b], ends[a:b])


def read_blocks(file: IndexedFile, numbers: range, into: memoryview) -> None:
    """Read consecutive blocks of one state entry, or the header, into a buffer of their size, and verify them.

    Raises:
        CheckpointError: the file cannot be read, or a checksum differs; names file and bytes.
    """
    begin, _ = file.block_range(numbers[0])
    try:
        count = file.data.read_into(begin, into)
    except OSError as error:
        raise CheckpointError(f"cannot read {file.data}: {error.strerror or error}") from error
    if count != len(into):
        raise CheckpointError(
            f"{file.data} is truncated: it ends at byte {begin + count:,} of {file.bytes:,}; use another checkpoint"
        )
    for number in numbers:
        first, last = file.block_range(number)
        if xxhash.xxh3_64_intdigest(into[first - begin : last - begin]) != file.digests[number]:
            raise CheckpointError(
                f"{file.data} is damaged: bytes {first:,} to {last:,} do not match their checksum; use another "
                "checkpoint"
            )


def _copy(plan: CopyPlan, read: _BlockRead, content: memoryview, block_bytes: int, target: NDArray[np.float32]) -> None:
    source = np.frombuffer(content, "<f4")
    first = (read.begins - read.first * block_bytes) // 4
    target_begin = plan.target[read.copies] + read.skipped
    size = (read.ends - read.begins) // 4
    numbers = zip(read.copies.tolist(), first.tolist(), target_begin.tolist(), size.tolist(), strict=True)
    contiguous = plan.contiguous[read.copies].tolist()
    for is_contiguous, (i, begin, to, count) in zip(contiguous, numbers, strict=True):
        if is_contiguous:
            target[to : to + count] = source[begin : begin + count]
        else:
            extent = plan.extent[:, i]
            into = np.ndarray(extent, target.dtype, target, 4 * to, 4 * plan.target_strides[:, i])
            into[...] = np.ndarray(extent, source.dtype, content, 4 * begin, 4 * plan.source_strides[:, i])
