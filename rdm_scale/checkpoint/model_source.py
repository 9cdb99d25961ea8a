"""Sources of a model's weights: checkpoints of any layout, and folders of merged weights.

A merged folder holds `model.safetensors` (or numbered files and their index) with the parameters under this project's
names, and `config.json` with everything else that is needed to use them.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from rdm_scale.checkpoint.directory import is_checkpoint, open_checkpoint
from rdm_scale.checkpoint.format.finite import refuse_non_finite_tensor
from rdm_scale.checkpoint.format.reader import TensorReader
from rdm_scale.checkpoint.search import find_checkpoint
from rdm_scale.checkpoint.state import CheckpointState
from rdm_scale.codecs.record import CodecRecord
from rdm_scale.config import ModelConfig, RunConfig, Weights, WeightsName, parse_config, parse_weights
from rdm_scale.data.manifest import TextEncoding
from rdm_scale.errors import CheckpointError
from rdm_scale.models import build_model
from rdm_scale.storage.json_files import read_json_object
from rdm_scale.storage.location import Location
from rdm_scale.storage.safetensors_folder import SafetensorsReader, Shape

StateEntry = Literal["ema", "weights"]  # names of the weights in files
MERGED = "model"  # stem of the .safetensors files
CONFIG = "config.json"
_MAX_POSITIONS = 2**31
_GROUP_ELEMENTS = 2**23  # small tensors are read together, up to 32 MiB at a time


class MergedConfig(BaseModel):
    """`config.json` of a merged folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["rdm_scale.model"] = "rdm_scale.model"
    version: Literal[1] = 1
    weights: StateEntry
    dtype: str
    step: int
    averaged: tuple[str, ...] = ()  # the checkpoints that these weights are the mean of
    config: dict[str, Any]
    codec: CodecRecord
    class_names: tuple[str, ...]
    text: TextEncoding | None = None


@dataclass(frozen=True)
class ModelSource:
    """Weights of a model, read on demand, with what is needed to use them. All shapes match the configuration."""

    where: Location
    weights: Weights
    step: int
    config: RunConfig
    codec: CodecRecord
    class_names: tuple[str, ...]
    text: TextEncoding | None
    shapes: dict[str, Shape]  # in the order of the model's parameters
    _reader: TensorReader | SafetensorsReader

    @property
    def elements(self) -> int:
        """Number of elements of all parameters."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def entry(self) -> StateEntry:
        """Name of the weights in files."""
        return "ema" if self.weights == "ema" else "weights"

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Read every parameter in fp32, in the order of `shapes`; memory holds one, or a few small ones.

        Yields:
            Name and tensor.

        Raises:
            CheckpointError: a file cannot be read or is damaged.
            NonFiniteError: a parameter holds NaN or infinity.
        """
        if isinstance(self._reader, SafetensorsReader):
            yield from ((name, self.read(name)) for name in self.shapes)
            return
        for group in _groups(self.shapes):
            for name, tensor in self._reader.read_many(self.entry, group).items():
                yield name, refuse_non_finite_tensor(name, tensor, self.where)

    def read(self, name: str) -> Tensor:
        """Read one parameter in fp32. Raises CheckpointError and NonFiniteError as `stream` does."""
        if isinstance(self._reader, SafetensorsReader):
            tensor = self._reader.read(name).float()
        else:
            tensor = self._reader.read(self.entry, name)
        return refuse_non_finite_tensor(name, tensor, self.where)


def open_model(path: str, weights: WeightsName | None = None) -> ModelSource:
    """Open the weights at `path` without reading them.

    Args:
        path: a checkpoint's folder, a run's directory or a folder of checkpoints (the newest one is used), or a merged
            folder; a local path or any fsspec URL.
        weights: the EMA weights (ema), or those without averaging (raw, also called weights). None: the EMA weights,
            or those that a merged folder has.

    Raises:
        CheckpointError: there is no complete checkpoint, it is damaged or was not written by this project, or a merged
            folder has other weights.
        ConfigError: there are no weights of that name.
    """
    chosen = None if weights is None else parse_weights(weights)
    here = Location(path)
    if not is_checkpoint(here) and (here / CONFIG).exists():
        return _open_merged(here, chosen)
    folder = find_checkpoint(path)
    state, reader = open_checkpoint(folder)
    entry: StateEntry = "weights" if chosen == "raw" else "ema"
    if entry not in reader.entries():
        raise CheckpointError(f"{folder} has no {entry}; it has {', '.join(reader.entries())}")
    found = _describe(state, folder)
    shapes = _checked_shapes({name: reader.shape(name) for name in reader.names()}, found.config.model, folder)
    return ModelSource(
        folder, chosen or "ema", state["step"], found.config, found.codec, found.class_names, found.text, shapes, reader
    )  # fmt: skip


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shapes of a model's parameters by name, in their order. Nothing is allocated."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in build_model(config).named_parameters()}


def compare_shapes(found: Mapping[str, Shape], expected: Mapping[str, Shape], where: object) -> None:
    """Raise CheckpointError unless names and shapes are equal, with the missing, unknown and different ones."""
    missing, unknown = [n for n in expected if n not in found], [n for n in found if n not in expected]
    wrong = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    problems = [("lacks", missing), ("has unknown tensors:", unknown), ("has other shapes:", wrong)]
    lines = [f"it {what} {_few(names)}" for what, names in problems if names]
    if lines:
        raise CheckpointError(
            "\n  ".join([f"{where} does not match the model that its configuration describes:", *lines])
        )


def _few(names: list[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _open_merged(folder: Location, chosen: Weights | None) -> ModelSource:
    tree = read_json_object(folder / CONFIG, CheckpointError)
    if tree.get("format") != "rdm_scale.model":
        raise CheckpointError(
            f"{folder} is neither a checkpoint nor a folder that tools/merge_checkpoint.py wrote"
            + (": use tools/import_checkpoint.py for a model of diffusers" if "_class_name" in tree else "")
        )
    try:
        merged = MergedConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{folder / CONFIG}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    held: Weights = "ema" if merged.weights == "ema" else "raw"
    if chosen not in (None, held):
        raise CheckpointError(
            f"{folder} holds the {held} weights only, not the {chosen} ones: ask for those that it has, or "
            f"merge the checkpoint again with --weights {chosen}"
        )
    config = parse_config(merged.config, str(folder / CONFIG))
    reader = SafetensorsReader.of_folder(folder, MERGED)
    shapes = _checked_shapes(reader.shapes, config.model, folder)
    return ModelSource(
        folder, held, merged.step, config, merged.codec, merged.class_names, merged.text, shapes, reader
    )  # fmt: skip


class _Description(NamedTuple):
    config: RunConfig
    codec: CodecRecord
    class_names: tuple[str, ...]
    text: TextEncoding | None


def _describe(state: CheckpointState, folder: Location) -> _Description:
    """Validate the parts of a checkpoint's state that are needed to use its weights."""
    missing = [key for key in ("config", "codec", "class_names") if key not in state]
    if missing:
        raise CheckpointError(f"the state of {folder} has no {missing[0]}: it was not written by rdm_scale")
    try:
        codec = CodecRecord.model_validate(state["codec"])
        text = None if state.get("text") is None else TextEncoding.model_validate(state["text"])
    except ValidationError as error:
        raise CheckpointError(f"the state of {folder} has an invalid codec or text encoding: {error}") from None
    return _Description(parse_config(state["config"], str(folder)), codec, tuple(state["class_names"]), text)


def _checked_shapes(found: Mapping[str, Shape], config: ModelConfig, where: Location) -> dict[str, Shape]:
    """Shapes of the configured model, after checking that the tensors in `found` have them.

    The configuration is untrusted: it is compared with the tensors before a model of its size is built.
    """
    if config.depth > len(found):
        raise CheckpointError(
            f"the configuration in {where} describes {config.depth:,} blocks, but there are only {len(found):,} tensors"
        )
    if config.tokens * config.hidden_size > _MAX_POSITIONS:  # position tables are not among the tensors
        raise CheckpointError(
            f"the configuration in {where} describes {config.tokens:,} tokens of width {config.hidden_size:,}: at most "
            f"{_MAX_POSITIONS:,} elements are supported"
        )
    try:
        expected = parameter_shapes(config)
    except RuntimeError as error:  # sizes beyond 64 bits
        raise CheckpointError(f"the configuration in {where} describes an impossible model: {error}") from None
    compare_shapes(found, expected, where)
    return expected


def _groups(shapes: Mapping[str, Shape]) -> Iterator[list[str]]:
    group: list[str] = []
    elements = 0
    for name, shape in shapes.items():
        if group and elements + math.prod(shape) > _GROUP_ELEMENTS:
            yield group
            group, elements = [], 0
        group.append(name)
        elements += math.prod(shape)
    if group:
        yield group
