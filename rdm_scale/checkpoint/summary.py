"""What is in a checkpoint, and whether all of it still is what was written."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from rdm_scale.checkpoint.directory import open_checkpoint
from rdm_scale.checkpoint.format.index import BLOCK_BYTES, IndexedFile
from rdm_scale.checkpoint.format.range_reader import ThreadBuffer, read_blocks
from rdm_scale.checkpoint.format.reader import TensorReader
from rdm_scale.checkpoint.sources import ModelSource, parameter_shapes
from rdm_scale.config import parse_config
from rdm_scale.errors import CheckpointError
from rdm_scale.models.gates import branch_multiplier
from rdm_scale.storage.location import Location
from rdm_scale.storage.safetensors_folder import Shape


@dataclass(frozen=True)
class TensorSummary:
    name: str
    shape: Shape
    norms: dict[str, float]  # Euclidean, of each field


def summarize(folder: Location) -> tuple[dict[str, Any], int, Iterator[TensorSummary]]:
    """State, number of tensors, and norms of every field of them one by one; memory holds one tensor.

    Raises:
        CheckpointError: as `open_checkpoint`; while iterating, when bytes are not what was written.
    """
    state, reader = open_checkpoint(folder)
    return state, len(reader.names()), _summaries(reader, state, folder)


def _summaries(reader: TensorReader, state: dict[str, Any], folder: Location) -> Iterator[TensorSummary]:
    there = set(reader.names())
    config = parse_config(state["config"], str(folder)).model if "config" in state else None
    known = parameter_shapes(config) if config and config.depth <= len(there) else {}
    names = [name for name in known if name in there]
    for name in (*names, *sorted(there - set(names))):
        norms = {field: torch.linalg.vector_norm(reader.read(field, name)).item() for field in reader.entries()}
        yield TensorSummary(name, reader.shape(name), norms)


@dataclass(frozen=True)
class GateSummary:
    """Alpha (or beta) of one residual branch without its conditional part: a (or b) times what models/gates.py
    multiplies it by."""

    name: str
    mean: float
    smallest: float
    largest: float


def gates(source: ModelSource) -> Iterator[GateSummary]:
    """Of every learnt gate of a model, in the order of its blocks; none where gates are functions of the condition."""
    multiplier = branch_multiplier(source.config.model)
    for name in source.shapes:
        if name.endswith((".gate.a", ".gate.b")):
            value = multiplier * source.read(name)
            yield GateSummary(name, value.mean().item(), value.min().item(), value.max().item())


def verify(folder: Location, progress: Callable[[int], object] = lambda size: None) -> list[str]:
    """Reads every byte of a checkpoint again and compares all checksums.

    Args:
        progress: called with the bytes of each block verified.

    Returns:
        What is wrong, a line for each damaged block, with the file and the bytes; empty when nothing is.

    Raises:
        CheckpointError: so much is missing or damaged that the rest cannot be looked at: it has no commit, a file is
            missing or cut off, or an index or `state.json` is damaged. It names the file.
    """
    _, reader = open_checkpoint(folder)
    scratch = ThreadBuffer()

    def damage(block: tuple[IndexedFile, int]) -> str | None:
        file, number = block
        begin, end = file.block_range(number)
        try:
            read_blocks(file, range(number, number + 1), scratch.take(end - begin))
        except CheckpointError as error:
            return str(error)
        return None

    blocks = [(file, i) for file in reader.files for i in range(len(file.digests))]
    problems = []
    with ThreadPoolExecutor(4) as pool:
        for problem in pool.map(damage, blocks):
            progress(BLOCK_BYTES)
            if problem is not None:
                problems.append(problem)
    return problems
