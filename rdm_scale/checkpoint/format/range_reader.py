"""Copies out of the files of a checkpoint: few large reads of whole blocks, each verified, a few at a time."""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from rdm_scale.checkpoint.format.index import BLOCK_BYTES, IndexedFile
from rdm_scale.checkpoint.format.overlap import Copies, Ints
from rdm_scale.errors import CheckpointError

_FAR_BYTES = 8 * BLOCK_BYTES  # most that a range read fetches from afar, unless a rectangle with gaps is larger
_NEAR_BYTES = BLOCK_BYTES  # from a local file, where a read costs little and a block stays in the processor's cache
_FAR_READERS, _NEAR_READERS = 4, 2  # reads under way at a time: from memory and disk, two cores are enough


class Scratch(threading.local):
    """Memory of each thread, which is kept: new memory takes longer than a read."""

    _buffer = bytearray()

    def take(self, size: int) -> memoryview:
        """Valid until the thread takes the next."""
        if len(self._buffer) < size:
            self._buffer = bytearray(size)
        return memoryview(self._buffer)[:size]


class Sweeper:
    """Carries out copies out of these files; its threads and their memory are kept from one call to the next."""

    def __init__(self, files: Sequence[IndexedFile]) -> None:
        self._files = files
        near = all(file.data.is_local for file in files)
        self._window_bytes = _NEAR_BYTES if near else _FAR_BYTES
        self._readers = _NEAR_READERS if near else _FAR_READERS
        self._scratch = Scratch()
        self._threads = ThreadPoolExecutor(self._readers)

    def carry_out(self, copies: Copies, owner: Ints, position: Ints, field: str, target: NDArray[np.float32]) -> None:
        """Fills `target` by the copies; number k comes from byte `position[k]` of the field in file `owner[k]`.

        Raises:
            CheckpointError: a file has no such field, cannot be read, or its bytes are not what was written; names
                file and bytes.
        """
        reads = iter(list(_plan_reads(copies, owner, position, self._window_bytes)))
        begins = {i: self._files[i].first_block(field) for i in np.unique(owner).tolist()}

        def work() -> None:
            try:
                for read in reads:  # each of them goes to one of the threads
                    self._do(read, begins[read.file], copies, target)
            except BaseException:
                deque(reads, maxlen=0)  # the others begin no more
                raise

        threads, _ = wait([self._threads.submit(work) for _ in range(self._readers)])
        for thread in threads:
            thread.result()

    def _do(self, read: "_Read", first_block: int, copies: Copies, target: NDArray[np.float32]) -> None:
        file, k = self._files[read.file], read.copies[0]
        numbers = range(first_block + read.first, first_block + read.last + 1)
        size = file.block_range(numbers[-1])[1] - file.block_range(numbers[0])[0]
        if len(read.copies) == 1 and copies.contiguous[k] and read.ends[0] - read.begins[0] == size:
            goal = target[copies.target[k] + read.skipped[0] :].view(np.uint8).data
            fetch_blocks(file, numbers, goal[:size])  # every byte is wanted, and in one run
        else:
            content = self._scratch.take(size)
            fetch_blocks(file, numbers, content)
            _copy(copies, read, content, target)


@dataclass(frozen=True)
class _Read:
    """Blocks `first` to `last` of a field in a file, and the copies out of them."""

    file: int
    first: int
    last: int
    copies: Ints  # [K]: which of the plan's
    skipped: Ints  # [K]: elements of a contiguous copy that earlier reads have done
    begins: Ints  # [K]: bytes into the field
    ends: Ints  # [K]


def _plan_reads(copies: Copies, owner: Ints, position: Ints, window_bytes: int) -> Iterator[_Read]:
    """Few large reads of whole blocks: copies that begin in the same window of a field and lie close are read together.

    Contiguous copies are cut where windows end; a strided one is read as a whole.
    """
    end = position + 4 * copies.span
    window = position // window_bytes
    parts = np.where(copies.contiguous, (end - 1) // window_bytes - window + 1, 1)
    which = np.repeat(np.arange(len(parts)), parts)
    part = np.arange(len(which)) - np.repeat(np.cumsum(parts) - parts, parts)
    window = window[which] + part
    whole = ~copies.contiguous[which]
    begins = np.where(whole | (part == 0), position[which], window * window_bytes)
    ends = np.where(whole, end[which], np.minimum(end[which], (window + 1) * window_bytes))
    skipped = (begins - position[which]) // 4

    order = np.lexsort((begins, window, owner[which]))
    which, begins, ends, skipped, window = (a[order] for a in (which, begins, ends, skipped, window))
    far = begins[1:] // BLOCK_BYTES > ends[:-1] // BLOCK_BYTES + 1
    new = far | (window[1:] != window[:-1]) | (np.diff(owner[which]) != 0)
    group = np.flatnonzero(np.append(True, new)[: len(which)])
    firsts = begins[group] // BLOCK_BYTES
    lasts = (np.maximum.reduceat(ends, group) - 1) // BLOCK_BYTES if len(group) else group
    bounds = zip(owner[which[group]].tolist(), firsts.tolist(), lasts.tolist(), strict=True)
    cuts = [*group.tolist(), len(which)]
    for (file, first, last), a, b in zip(bounds, cuts, cuts[1:], strict=False):
        yield _Read(file, first, last, which[a:b], skipped[a:b], begins[a:b], ends[a:b])


def fetch_blocks(file: IndexedFile, numbers: range, into: memoryview) -> None:
    """Reads some blocks of one field (or the header's) into memory of their size, and verifies them.

    Raises:
        CheckpointError: the file cannot be read, or its bytes are not what was written; names file and bytes.
    """
    begin, _ = file.block_range(numbers[0])
    try:
        there = file.data.read_into(begin, into)
    except OSError as error:
        raise CheckpointError(f"cannot read {file.data}: {error.strerror or error}") from error
    if there != len(into):
        raise CheckpointError(f"{file.data} is truncated: it ends at byte {begin + there:,} of {file.bytes:,}")
    for number in numbers:
        first, last = file.block_range(number)
        if xxhash.xxh3_64_intdigest(into[first - begin : last - begin]) != file.digests[number]:
            raise CheckpointError(
                f"{file.data} is damaged: bytes {first:,} to {last:,} are not what was written (checksum differs); use "
                "another checkpoint"
            )


def _copy(copies: Copies, read: _Read, content: memoryview, target: NDArray[np.float32]) -> None:
    source = np.frombuffer(content, "<f4")
    first = (read.begins - read.first * BLOCK_BYTES) // 4
    goal = copies.target[read.copies] + read.skipped
    size = (read.ends - read.begins) // 4
    plan = zip(read.copies.tolist(), first.tolist(), goal.tolist(), size.tolist(), strict=True)
    contiguous = copies.contiguous[read.copies].tolist()
    for is_run, (i, begin, to, count) in zip(contiguous, plan, strict=True):
        if is_run:
            target[to : to + count] = source[begin : begin + count]
        else:
            extent = copies.extent[:, i]
            into = np.ndarray(extent, target.dtype, target, 4 * to, 4 * copies.target_strides[:, i])
            into[...] = np.ndarray(extent, source.dtype, content, 4 * begin, 4 * copies.source_strides[:, i])
