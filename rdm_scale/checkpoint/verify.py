"""Verification of a checkpoint's checksums."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from rdm_scale.checkpoint.directory import open_checkpoint
from rdm_scale.checkpoint.format.finite import count_non_finite
from rdm_scale.checkpoint.format.index import IndexedFile
from rdm_scale.checkpoint.format.range_reader import ThreadBuffer, read_blocks
from rdm_scale.errors import CheckpointError
from rdm_scale.storage.location import Location

_THREADS = 4


class _Block(NamedTuple):
    file: IndexedFile
    number: int


def verify(folder: Location, progress: Callable[[int], object] = lambda size: None) -> list[str]:
    """Read every byte of a checkpoint, compare all checksums, and look for values that are not finite.

    Args:
        folder: the checkpoint's folder.
        progress: called with the bytes of each verified block.

    Returns:
        A message for each block that is damaged or not finite, with file and bytes; empty if there is none.

    Raises:
        CheckpointError: the checkpoint is too damaged to be opened: it has no commit, a file is missing or truncated,
            or an index or `state.json` is damaged. The message names the file.
    """
    _, reader = open_checkpoint(folder)
    buffer = ThreadBuffer()

    def damage(block: _Block) -> str | None:
        begin, end = block.file.block_range(block.number)
        try:
            content = buffer.take(end - begin)
            read_blocks(block.file, range(block.number, block.number + 1), content)
        except CheckpointError as error:
            return str(error)
        if block.number and (count := count_non_finite(np.frombuffer(content, np.float32))):  # block 0 is the header
            return f"{block.file.data} holds {count:,} values that are NaN or infinite, in bytes {begin:,} to {end:,}"
        return None

    blocks = [_Block(file, i) for file in reader.files for i in range(len(file.digests))]
    problems = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for block, problem in zip(blocks, pool.map(damage, blocks), strict=True):
            progress(block.file.block_bytes)
            if problem is not None:
                problems.append(problem)
    return problems
