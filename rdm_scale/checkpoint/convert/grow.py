"""Depth growth of a checkpoint: write the checkpoint of a deeper model, from which training continues.

models/depth_growth.py says which weights the deeper model has. Its optimizer state follows from them: gates are
multiplied by q, and a loss that is the same function of the products has a gradient 1/q times as large in the new
gates. Adam's exp_avg is therefore multiplied by 1/q and its exp_avg_sq by 1/q^2. New blocks start without optimizer
state.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rdm_scale.checkpoint.convert.checkpoint_writer import STATE_ENTRIES, NamedEntries, write_checkpoint
from rdm_scale.checkpoint.directory import CheckpointDirectory, open_checkpoint
from rdm_scale.checkpoint.format.finite import refuse_non_finite_tensor
from rdm_scale.checkpoint.format.reader import TensorReader
from rdm_scale.checkpoint.model_source import find_checkpoint, parameter_shapes
from rdm_scale.checkpoint.state import CheckpointState
from rdm_scale.config import RunConfig, parse_config
from rdm_scale.errors import CheckpointError
from rdm_scale.models.depth_growth import BlockPlacement, DepthGrowth
from rdm_scale.storage.location import Location
from rdm_scale.storage.safetensors_folder import Shape

_GATE_POWERS = {"exp_avg": -1, "exp_avg_sq": -2}  # of q, for each entry of the optimizer state


@dataclass(frozen=True)
class GrownCheckpoint:
    """The checkpoint that was written, and the run's configuration before and after growth."""

    folder: Location
    step: int
    before: RunConfig
    after: RunConfig


def grow_checkpoint(
    path: str,
    depth: int,
    out: str,
    placement: BlockPlacement = "interleaved",
    restart: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> GrownCheckpoint:
    """Write a checkpoint of `depth` blocks with the same function as the one at `path`.

    Weights, EMA weights and optimizer state are grown. The rest of the state is copied, so that training continues with
    the same step, data and seed. Memory holds one block at a time.

    Args:
        path: a checkpoint's folder, or a run's directory or a folder of checkpoints (the newest one is used); a local
            path or any fsspec URL.
        depth: number of blocks of the deeper model.
        out: folder of checkpoints to write to; a local path or any fsspec URL.
        placement: placement of the new blocks.
        restart: reset the step, the position in the data and the optimizer state to 0, so that the warm-up and the
            learning rate schedule start again.
        progress: called as progress(parameters written, total parameters) after every tensor.

    Raises:
        CheckpointError: there is no complete checkpoint at `path`, it is damaged or was not written by this project, or
            `out` already has a checkpoint of that step.
        ConfigError: its model cannot be grown in this way.
    """
    source = find_checkpoint(path)
    state, reader = open_checkpoint(source)
    before = parse_config(state.get("config", {}), str(source))
    growth = DepthGrowth(before.model, depth, placement)
    after = before.model_copy(update={"model": growth.new})
    after = parse_config(after.model_dump(mode="json"), f"of {source} with model.depth={depth}")
    directory, step = CheckpointDirectory(Location(out)), 0 if restart else state["step"]
    if directory.folder(step).exists():
        raise CheckpointError(f"{directory.folder(step)} exists already: choose another folder, or remove it first")
    shapes = _checked_shapes(growth, reader, source)
    tensors = _grown_tensors(growth, reader, source, shapes, before.train.seed, keep_optimizer_state=not restart)
    grown: CheckpointState = {
        **state,
        "step": step,
        "samples": step * before.train.global_batch_size,
        "config": after.model_dump(mode="json"),
        "identity": _identity(state, source) | after.identity(),
        "layout": {"tensor": 1, "pipeline": 1, "data": 1},
        "grown_from": {"checkpoint": str(source), "depth": before.model.depth, "placement": placement},
    }
    counted = _report_each(tensors, sum(math.prod(shape) for shape in shapes.values()), progress)
    return GrownCheckpoint(write_checkpoint(directory, grown, counted), step, before, after)


def grown_entry(growth: DepthGrowth, name: str, entry: str, source: Tensor) -> Tensor:
    """State entry of the grown model's parameter `name`, given the same entry of its source."""
    if entry not in _GATE_POWERS:
        return growth.grown_value(name, source)
    if growth.is_new(name):
        return torch.zeros_like(source)
    return growth.rescale_gates(name, source, _GATE_POWERS[entry])


def initial_entry(growth: DepthGrowth, name: str, entry: str, shape: Shape, seed: int) -> Tensor:
    """State entry of the grown model's parameter `name`, which has no source."""
    return torch.zeros(shape) if entry in _GATE_POWERS else growth.initial_value(name, torch.Size(shape), seed)


def _identity(state: CheckpointState, source: Location) -> dict[str, Any]:
    identity: object = state.get("identity")
    if not isinstance(identity, dict):
        raise CheckpointError(f"the state of {source} does not identify its run: it was not written by rdm_scale")
    return identity


def _checked_shapes(growth: DepthGrowth, reader: TensorReader, source: Location) -> dict[str, Shape]:
    """Names and shapes of the grown model, after checking that the checkpoint holds exactly their sources."""
    shapes = parameter_shapes(growth.new)
    sources = {old: shape for name, shape in shapes.items() if (old := growth.source(name)) is not None}
    if differing := sorted(sources.keys() ^ set(reader.names())):
        name = differing[0]
        raise CheckpointError(
            f"{source} {'lacks' if name in sources else 'has'} the tensor {name}, which does not match its "
            "configuration: it was not written by this version of rdm_scale"
        )
    for name, shape in sources.items():
        if reader.shape(name) != shape:
            raise CheckpointError(
                f"{source}: {name} has shape {list(reader.shape(name))}, but its configuration says {list(shape)}"
            )
    return shapes


def _grown_tensors(
    growth: DepthGrowth,
    reader: TensorReader,
    source: Location,
    shapes: dict[str, Shape],
    seed: int,
    keep_optimizer_state: bool,
) -> Iterator[NamedEntries]:
    """Yield all state entries of the grown model's parameters, block by block."""
    for _, group in itertools.groupby(shapes, lambda name: name.split(".")[:2]):
        names = list(group)
        sources = {name: old for name in names if (old := growth.source(name)) is not None}
        values = {entry: reader.read_many(entry, list(sources.values())) for entry in STATE_ENTRIES}
        for read in values.values():
            for name, tensor in read.items():
                refuse_non_finite_tensor(name, tensor, source)
        for name in names:
            entries = {
                entry: grown_entry(growth, name, entry, values[entry][sources[name]])
                if name in sources
                else initial_entry(growth, name, entry, shapes[name], seed)
                for entry in STATE_ENTRIES
            }
            if not keep_optimizer_state:
                entries |= {entry: torch.zeros(shapes[name]) for entry in _GATE_POWERS}
            yield name, entries


def _report_each(
    tensors: Iterable[NamedEntries], total: int, progress: Callable[[int, int], object]
) -> Iterator[NamedEntries]:
    """Pass tensors on, and report the parameters passed on so far."""
    done = 0
    for name, entries in tensors:
        yield name, entries
        done += entries["weights"].numel()
        progress(done, total)
