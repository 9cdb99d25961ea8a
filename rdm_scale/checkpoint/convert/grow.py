"""A checkpoint of a deeper model out of one of a shallower, which training goes on from."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rdm_scale.checkpoint.convert.checkpoint_writer import STATE_ENTRIES, write_checkpoint
from rdm_scale.checkpoint.convert.depth_growth import Growth, Placement
from rdm_scale.checkpoint.directory import CheckpointDirectory, open_checkpoint
from rdm_scale.checkpoint.format.reader import TensorReader
from rdm_scale.checkpoint.sources import find_checkpoint
from rdm_scale.config import RunConfig, parse_config
from rdm_scale.errors import CheckpointError
from rdm_scale.models import build_model
from rdm_scale.storage.location import Location


@dataclass(frozen=True)
class Grown:
    """The checkpoint that was written, and the run's configuration before and after."""

    folder: Location
    step: int
    before: RunConfig
    after: RunConfig


def grow_checkpoint(
    path: str, depth: int, out: str, placement: Placement = "interleaved", restart: bool = False
) -> Grown:
    """Writes into the folder `out` a checkpoint of `depth` blocks that computes what the one at `path` does.

    Weights, moments and averages become those that models/growth.py says; everything else of the state goes along, so
    that training goes on with the same step, data and seed. One block is in memory at a time.

    Args:
        path: a checkpoint's folder, or a run's directory or folder of checkpoints, of which the newest is taken; local
            or any fsspec URL, as `out`.
        restart: step and position in the data are 0 again and all moments zero, so that warm-up and schedule of the
            learning rate begin anew.

    Raises:
        CheckpointError: there is no complete checkpoint at `path`, it is damaged or not one of this project's, or `out`
            holds a checkpoint of that step.
        ConfigError: its model cannot be grown so.
    """
    source = find_checkpoint(path)
    state, reader = open_checkpoint(source)
    before = parse_config(state.get("config", {}), str(source))
    growth = Growth(before.model, depth, placement)
    after = before.model_copy(update={"model": growth.new})
    after = parse_config(after.model_dump(mode="json"), f"of {source} with model.depth={depth}")
    directory, step = CheckpointDirectory(Location(out)), 0 if restart else state["step"]
    if directory.folder(step).exists():
        raise CheckpointError(f"{directory.folder(step)} exists already: name another folder, or remove it first")
    shapes = _shapes(growth, reader, source)
    tensors = _tensors(growth, reader, shapes, before.train.seed, keeps_moments=not restart)
    changes = {
        "step": step,
        "samples": step * before.train.global_batch_size,
        "config": after.model_dump(mode="json"),
        "identity": _identity(state, source) | after.identity(),
        "layout": {"tensor": 1, "pipeline": 1, "data": 1},
        "grown_from": {"checkpoint": str(source), "depth": before.model.depth, "placement": placement},
    }
    return Grown(write_checkpoint(directory, {**state, **changes}, tensors), step, before, after)


def _identity(state: Mapping[str, Any], source: Location) -> dict[str, Any]:
    identity = state.get("identity")
    if not isinstance(identity, dict):
        raise CheckpointError(f"{source} does not say what run it belongs to: it is not one of ours")
    return identity


def _shapes(growth: Growth, reader: TensorReader, source: Location) -> dict[str, torch.Size]:
    """Names and shapes of the grown model, whose sources are all in the checkpoint and all that is in it."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in build_model(growth.new).named_parameters()}
    sources = {old: shape for name, shape in shapes.items() if (old := growth.source(name)) is not None}
    for odd in sorted(sources.keys() ^ set(reader.names())):
        raise CheckpointError(
            f"{source} {'lacks' if odd in sources else 'has'} the tensor {odd}, which does not fit its configuration: "
            "it was not written by this version of the project"
        )
    for name, shape in sources.items():
        if reader.shape(name) != tuple(shape):
            raise CheckpointError(f"{source}: {name} has shape {list(reader.shape(name))}, not as configured")
    return shapes


def _tensors(
    growth: Growth, reader: TensorReader, shapes: dict[str, torch.Size], seed: int, keeps_moments: bool
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The grown model's tensors in all fields, a block after the other."""
    for _, group in itertools.groupby(shapes, lambda name: name.split(".")[:2]):
        names = list(group)
        sources = {name: old for name in names if (old := growth.source(name)) is not None}
        values = {field: reader.read_many(field, list(sources.values())) for field in STATE_ENTRIES}
        for name in names:
            tensors = {
                field: growth.carried(name, field, values[field][sources[name]])
                if name in sources
                else growth.fresh(name, field, shapes[name], seed)
                for field in STATE_ENTRIES
            }
            if not keeps_moments:
                tensors |= {field: torch.zeros(shapes[name]) for field in ("exp_avg", "exp_avg_sq")}
            yield name, tensors
