"""Copies out of the files of a checkpoint: few large reads of whole blocks, each verified, a few at a time."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from rdm_scale.checkpoint.index import BLOCK_BYTES, IndexedFile
from rdm_scale.checkpoint.rectangles import Copies, Ints
from rdm_scale.errors import CheckpointError

_FAR_BYTES = 8 * BLOCK_BYTES  # most that a range read fetches from afar, unless a rectangle with gaps is larger
_NEAR_BYTES = BLOCK_BYTES  # from a local file, where a read costs little and a block stays in the processor's cache
_READERS = 4  # range reads under way at a time


def carry_out(
    copies: Copies, files: Sequence[IndexedFile], owner: Ints, position: Ints, target: NDArray[np.float32]
) -> None:
    """Fills `target` by the copies, of which number k comes from byte `position[k]` of file `owner[k]`.

    Raises:
        CheckpointError: a file cannot be read, or its bytes are not what was written; names file and bytes.
    """
    near = all(file.data.is_local for file in files)
    memory = threading.local()

    def one(read: _Read) -> None:
        _copy(copies, read, fetch_blocks(files[read.file], read.first, read.last, memory), target)

    _in_threads(one, _plan_reads(copies, owner, position, _NEAR_BYTES if near else _FAR_BYTES))


@dataclass(frozen=True)
class _Read:
    """Blocks `first` to `last` of a file, and the copies out of them."""

    file: int
    first: int
    last: int
    copies: Ints  # [K]: which of the plan's
    skipped: Ints  # [K]: elements of a contiguous copy that earlier reads have done
    begins: Ints  # [K]: bytes into the file
    ends: Ints  # [K]


def _plan_reads(copies: Copies, owner: Ints, position: Ints, window_bytes: int) -> Iterator[_Read]:
    """Few large reads of whole blocks: copies that begin in the same window of a file and lie close are read together.

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
    cuts = np.flatnonzero(far | (window[1:] != window[:-1]) | (np.diff(owner[which]) != 0)) + 1
    for group in np.split(np.arange(len(which)), cuts):
        if len(group):
            first, last = begins[group].min() // BLOCK_BYTES, (ends[group].max() - 1) // BLOCK_BYTES
            file = int(owner[which[group[0]]])
            yield _Read(file, int(first), int(last), which[group], skipped[group], begins[group], ends[group])


def fetch_blocks(file: IndexedFile, first: int, last: int, memory: threading.local) -> memoryview:
    """Blocks `first` to `last`, verified; valid until the next call in this thread."""
    begin, end = first * BLOCK_BYTES, min((last + 1) * BLOCK_BYTES, file.bytes)
    try:
        if len(getattr(memory, "buffer", b"")) < end - begin:
            memory.buffer = bytearray(end - begin)  # kept: new memory takes longer than the read
        view = memoryview(memory.buffer)[: end - begin]
        view = view[: file.data.read_into(begin, view)]
    except OSError as error:
        raise CheckpointError(f"cannot read {file.data}: {error.strerror or error}") from error
    if len(view) != end - begin:
        raise CheckpointError(f"{file.data} is truncated: it ends before byte {end:,} of {file.bytes:,}")
    for i in range(first, last + 1):
        block = view[i * BLOCK_BYTES - begin : (i + 1) * BLOCK_BYTES - begin]
        if xxhash.xxh3_64_intdigest(block) != file.digests[i]:
            raise CheckpointError(
                f"{file.data} is damaged: bytes {i * BLOCK_BYTES:,} to {i * BLOCK_BYTES + len(block):,} are not what "
                "was written (checksum differs); use another checkpoint"
            )
    return view


def _copy(copies: Copies, read: _Read, content: memoryview, target: NDArray[np.float32]) -> None:
    source = np.frombuffer(content, "<f4")
    first = (read.begins - read.first * BLOCK_BYTES) // 4
    goal = copies.target[read.copies] + read.skipped
    size = (read.ends - read.begins) // 4
    plan = zip(read.copies, first.tolist(), goal.tolist(), size.tolist(), strict=True)
    for i, begin, to, count in plan:
        if copies.contiguous[i]:
            target[to : to + count] = source[begin : begin + count]
        else:
            extent = copies.extent[i]
            into = np.ndarray(extent, target.dtype, target, 4 * to, 4 * copies.target_strides[i])
            into[...] = np.ndarray(extent, source.dtype, content, 4 * begin, 4 * copies.source_strides[i])


def _in_threads(work: Callable[[_Read], None], items: Iterable[_Read]) -> None:
    """work(item) for all items, a few at a time; raises what the first to fail raised, in their order."""
    with ThreadPoolExecutor(_READERS) as pool:
        waiting: deque[Future[None]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > 2 * _READERS:
                    waiting.popleft().result()
            while waiting:
                waiting.popleft().result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
