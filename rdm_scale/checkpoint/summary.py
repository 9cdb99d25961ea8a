"""Summary of a checkpoint: norms of its tensors and values of its gates."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from rdm_scale.checkpoint.directory import open_checkpoint
from rdm_scale.checkpoint.format.reader import TensorReader
from rdm_scale.checkpoint.model_source import ModelSource, parameter_shapes
from rdm_scale.checkpoint.state import CheckpointState
from rdm_scale.config import parse_config
from rdm_scale.models.gates import branch_multiplier
from rdm_scale.storage.location import Location
from rdm_scale.storage.safetensors_folder import Shape


@dataclass(frozen=True)
class TensorSummary:
    """Shape of a tensor and the Euclidean norm of each of its state entries."""

    name: str
    shape: Shape
    norms: dict[str, float]


class CheckpointSummary(NamedTuple):
    """State of a checkpoint and summaries of its tensors, which are read while iterating."""

    state: CheckpointState
    tensor_count: int
    tensors: Iterator[TensorSummary]


def summarize(folder: Location) -> CheckpointSummary:
    """Summarize a checkpoint, tensor by tensor; memory holds one tensor.

    Raises:
        CheckpointError: as `open_checkpoint`; while iterating, if bytes are damaged.
    """
    state, reader = open_checkpoint(folder)
    return CheckpointSummary(state, len(reader.names()), _tensor_summaries(reader, state, folder))


def _tensor_summaries(reader: TensorReader, state: CheckpointState, folder: Location) -> Iterator[TensorSummary]:
    """Summaries in the order of the model's parameters; unknown tensors come last, sorted by name."""
    stored = set(reader.names())
    config = parse_config(state["config"], str(folder)).model if "config" in state else None
    known = parameter_shapes(config) if config and config.depth <= len(stored) else {}
    names = [name for name in known if name in stored]
    for name in (*names, *sorted(stored - set(names))):
        norms = {entry: torch.linalg.vector_norm(reader.read(entry, name)).item() for entry in reader.entries()}
        yield TensorSummary(name, reader.shape(name), norms)


@dataclass(frozen=True)
class GateSummary:
    """Alpha or beta of a residual branch without its conditional part: a or b times its multiplier (models/gates)."""

    name: str
    mean: float
    smallest: float
    largest: float


def gates(source: ModelSource) -> Iterator[GateSummary]:
    """Summarize every learned gate in the order of the blocks; none if gates depend on the condition only."""
    multiplier = branch_multiplier(source.config.model)
    for name in source.shapes:
        if name.endswith((".gate.a", ".gate.b")):
            value = multiplier * source.read(name)
            yield GateSummary(name, value.mean().item(), value.min().item(), value.max().item())
