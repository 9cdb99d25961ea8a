"""A model out of a checkpoint, whole and on one process, for sampling and tools."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import ValidationError

from rdm_scale.checkpoint.directory import CheckpointDirectory, is_checkpoint, open_checkpoint
from rdm_scale.config import RunConfig, parse_config
from rdm_scale.data.manifest import Codec
from rdm_scale.data.storage import Location
from rdm_scale.errors import CheckpointError
from rdm_scale.models import DiffusionTransformer, build_model

Weights = Literal["ema", "weights"]


@dataclass(frozen=True)
class TrainedModel:
    """A model and what is needed to use it."""

    model: DiffusionTransformer
    config: RunConfig
    step: int
    codec: Codec
    class_names: tuple[str, ...]


def load_model(path: str, weights: Weights = "ema") -> DiffusionTransformer:
    """The model of a checkpoint in fp32, ready to draw samples; see `load_trained`."""
    return load_trained(path, weights).model


def load_trained(path: str, weights: Weights = "ema") -> TrainedModel:
    """The model of a checkpoint in fp32, with its configuration, codec and class names.

    Args:
        path: a checkpoint's folder, or a run's directory or folder of checkpoints, of which the newest is taken; local
            or any fsspec URL.
        weights: the averaged weights (ema) or the trained ones (weights).

    Raises:
        CheckpointError: there is no complete checkpoint, or it is damaged or not one of this project's.
    """
    if weights not in ("ema", "weights"):
        raise CheckpointError(f"weights={weights!r}: choose ema or weights")
    folder = find_checkpoint(path)
    state, reader = open_checkpoint(folder)
    config = parse_config(state["config"], str(folder))
    model = build_model(config.model)
    with torch.no_grad():
        values = reader.read_many(weights, [name for name, _ in model.named_parameters()])
        for name, parameter in model.named_parameters():
            if values[name].shape != parameter.shape:
                raise CheckpointError(f"{folder}: {name} has shape {list(values[name].shape)}, not as configured")
            parameter.copy_(values[name])
    return TrainedModel(
        model.eval().requires_grad_(False), config, state["step"], _codec(state, folder), tuple(state["class_names"])
    )


def find_checkpoint(path: str) -> Location:
    """The checkpoint at `path`, or the newest one of the run or folder of checkpoints at `path`."""
    here = Location(path)
    if is_checkpoint(here):
        return here
    for directory in (CheckpointDirectory(here / "checkpoints"), CheckpointDirectory(here)):
        latest = directory.latest()
        if latest is not None:
            return directory.folder(latest)
    raise CheckpointError(f"{here} is neither a complete checkpoint nor a run or folder that holds one")


def _codec(state: dict[str, Any], folder: Location) -> Codec:
    try:
        return Codec.model_validate(state["codec"])
    except ValidationError as error:
        raise CheckpointError(f"{folder} does not say validly how its latents were made: {error}") from None
