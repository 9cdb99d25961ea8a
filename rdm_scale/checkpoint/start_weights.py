"""Weights that a new run starts with (`checkpoint.start_from`): found and checked on one rank, loaded on all."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rdm_scale.checkpoint.convert.import_weights import PublishedWeights, open_published
from rdm_scale.checkpoint.directory import is_checkpoint, open_checkpoint
from rdm_scale.checkpoint.format.finite import refuse_non_finite_slices
from rdm_scale.checkpoint.format.slices import SliceTable, shape_of
from rdm_scale.checkpoint.model_source import CONFIG, ModelSource, open_model, parameter_shapes
from rdm_scale.checkpoint.sharded_state import slice_table
from rdm_scale.config import ModelConfig, RunConfig, Weights, flatten
from rdm_scale.data.compatibility import DataFacts
from rdm_scale.errors import CheckpointError
from rdm_scale.storage.json_files import read_json_object
from rdm_scale.storage.location import Location

if TYPE_CHECKING:
    from rdm_scale.parallel.parallel_model import ParallelModel


class StartWeights(NamedTuple):
    """Weights to start with, as all ranks find them."""

    path: str  # a checkpoint, a merged folder, a folder of diffusers or a file
    weights: Weights
    step: int  # of the run that trained them; 0 where it is unknown


def find_start_weights(config: RunConfig, facts: DataFacts) -> tuple[StartWeights, list[str]]:
    """Find the weights of `checkpoint.start_from` and check that they fit the model.

    Returns:
        The weights, and a warning for everything that they were trained with and that is different now.

    Raises:
        CheckpointError: there are no such weights, or they are of another model; says which keys differ.
    """
    path, weights = config.checkpoint.start_from, config.checkpoint.start_weights
    assert path is not None
    source = open_weights(path, weights, config.model)
    if isinstance(source, PublishedWeights):
        return StartWeights(str(source.where), weights, 0), []
    _refuse_other_shapes(source, config.model)
    return StartWeights(str(source.where), source.weights, source.step), _differences(source, config, facts)


def open_weights(path: str, weights: Weights, model: ModelConfig) -> ModelSource | PublishedWeights:
    """Open the weights of this project or of another at `path`; for EMA weights, those that a merged folder has.

    Raises:
        CheckpointError: there are none, or those of another project are not of `model`.
    """
    here = Location(path)
    if _is_published(here):
        return open_published(path, model, weights)
    merged = not is_checkpoint(here) and (here / CONFIG).exists()
    return open_model(path, None if merged and weights == "ema" else weights)


def load_start_weights(start: StartWeights, model: "ParallelModel") -> None:
    """Load the weights, also as EMA weights, on all ranks; the optimizer state is empty, at step 0. Collective.

    Raises:
        CheckpointError: they cannot be read or are damaged.
        NonFiniteError: they hold NaN or infinity.
    """
    table = slice_table(model.ranges)
    here = Location(start.path)
    with model.restoring(0) as state:
        sizes = [flat.numel() for flat in state.weights]
        values = torch.zeros(sum(sizes))
        if is_checkpoint(here):
            reader = open_checkpoint(here, table).reader
            reader.fill(table, "ema" if start.weights == "ema" else "weights", values)
        else:
            _fill(table, open_weights(start.path, start.weights, model.config.model), values)
        refuse_non_finite_slices(table, start.weights, values, f"{here} cannot be used", "Start from other weights")
        for flats in (state.weights, state.ema):
            for flat, part in zip(flats, values.split(sizes), strict=True):
                flat.copy_(part)


def _fill(table: SliceTable, source: ModelSource | PublishedWeights, out: Tensor) -> None:
    """Fill a rank's flat buffer, one tensor at a time."""
    slices = table.slices
    number, tensor = -1, torch.empty(0)
    for i in range(len(slices.tensor)):  # sorted by tensor
        if slices.tensor[i] != number:
            number = int(slices.tensor[i])
            name = table.names[number]
            tensor = source.convert(name) if isinstance(source, PublishedWeights) else source.read(name)
        dimensions = len(shape_of(table.shapes, number))
        offset, extent = (array[:dimensions, i].tolist() for array in (slices.offset, slices.extent))
        region = tensor[tuple(slice(o, o + n) for o, n in zip(offset, extent, strict=True))]
        start = int(slices.start[i])
        out[start : start + region.numel()] = region.reshape(-1)


def _is_published(here: Location) -> bool:
    """True for a file, and for a folder of diffusers or of a pipeline with one."""
    if not here.is_dir():
        return here.name.endswith((".safetensors", ".pt", ".pth"))
    if (here / CONFIG).exists():
        return "_class_name" in read_json_object(here / CONFIG, CheckpointError)
    return (here / "transformer" / CONFIG).exists()


def _refuse_other_shapes(source: ModelSource, model: ModelConfig) -> None:
    expected = parameter_shapes(model)
    if source.shapes == expected:
        return
    lines = [f"{key}: {then} in the weights, {now} in the configuration" for key, then, now in _changed(source, model)]
    raise CheckpointError(
        "\n  ".join(
            [
                f"checkpoint.start_from={source.where} holds the weights of a model with other tensors:",
                *lines,
                "set these keys as in the weights, or start from other weights",
            ]
        )
    )


def _changed(source: ModelSource, model: ModelConfig) -> list[tuple[str, object, object]]:
    """Each key of the model that differs, with its value in the weights and now."""
    then, now = (dict(flatten({"model": m.model_dump(mode="json")})) for m in (source.config.model, model))
    return [(key, then.get(key), now[key]) for key in now if then.get(key) != now[key]]


def _differences(source: ModelSource, config: RunConfig, facts: DataFacts) -> list[str]:
    """One line for everything but the shapes that the weights were trained with and that is different now."""
    found = [(key, str(then), str(now)) for key, then, now in _changed(source, config.model)]
    objectives = source.config.diffusion.objective, config.diffusion.objective
    found += [("diffusion.objective", *objectives)] if objectives[0] != objectives[1] else []
    if source.codec.model_copy(update={"location": facts.codec.location}) != facts.codec:
        found.append(("the codec of the latents", source.codec.name, facts.codec.name))
    if config.model.condition == "class" and source.class_names != facts.class_names:
        found.append(("the names of the classes", _few(source.class_names), _few(facts.class_names)))
    return [f"checkpoint.start_from={source.where} was trained with {k}: {then}, now {now}" for k, then, now in found]


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
