"""Import of published DiT weights: write a checkpoint that training can start from."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rdm_scale.checkpoint.convert.checkpoint_writer import NamedEntries, write_checkpoint
from rdm_scale.checkpoint.convert.diffusers_config import parse_diffusers_config
from rdm_scale.checkpoint.convert.parameter_mapping import (
    ParameterMapping,
    diffusers_names,
    map_parameters,
    original_names,
)
from rdm_scale.checkpoint.convert.state_dicts import open_tensors
from rdm_scale.checkpoint.directory import CheckpointDirectory
from rdm_scale.checkpoint.format.finite import refuse_non_finite_tensor
from rdm_scale.checkpoint.model_source import CONFIG, compare_shapes
from rdm_scale.checkpoint.state import CheckpointState
from rdm_scale.codecs.record import CodecRecord
from rdm_scale.config import ModelConfig, RunConfig, Weights, flatten, parse_config
from rdm_scale.errors import CheckpointError
from rdm_scale.storage.json_files import read_json_object
from rdm_scale.storage.location import Location
from rdm_scale.storage.safetensors_folder import SafetensorsReader, Shape

POSITIONS = "pos_embed"  # a fixed table that the original DiT stores among its weights
NO_DATA = "none"  # data.train of a checkpoint imported without a configuration


@dataclass(frozen=True)
class PublishedWeights:
    """External weights that are converted on demand. Their names and shapes are exactly those of `model`."""

    where: Location
    model: ModelConfig
    mappings: dict[str, ParameterMapping]  # by this project's name
    read: Callable[[str], Tensor]  # returns an external tensor by its name

    @property
    def elements(self) -> int:
        """Number of elements of all parameters."""
        return sum(math.prod(mapping.shape) for mapping in self.mappings.values())

    def convert(self, name: str) -> Tensor:
        """Parameter of this name, in fp32. Raises CheckpointError as `stream` does."""
        return refuse_non_finite_tensor(name, self.mappings[name].from_external(self.read), self.where)

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Convert every parameter to fp32, one by one, under this project's name.

        Raises:
            CheckpointError: a tensor cannot be read, or copies of an embedder differ.
            NonFiniteError: a tensor holds NaN or infinity.
        """
        for name in self.mappings:
            yield name, self.convert(name)


def open_published(source: str, model: ModelConfig | None, weights: Weights = "ema") -> PublishedWeights:
    """Open external weights without converting them.

    Args:
        source: a folder of diffusers' DiT (or of a pipeline, with a folder `transformer`), or a .safetensors or .pt
            file with the names of the original DiT.
        model: expected configuration; required for a file, which does not contain the number of heads.
        weights: of a file of a training loop that holds both, the ones to read.

    Raises:
        CheckpointError: a file is missing, damaged or contains pickled objects; tensors are missing, unknown or have
            other shapes; embedders of blocks differ; or the model is not `model`, with the keys that differ.
    """
    here = Location(source)
    published = _open_folder(here) if here.is_dir() else _open_file(here, model, weights)
    if model is not None:
        # adaln_zero does not use model.gate, which may have any values
        found, wanted = (dict(flatten(m.model_dump(mode="json", exclude={"gate"}))) for m in (published.model, model))
        lines = [
            f"model.{k}: {found[k]} in the weights, {wanted[k]} in the configuration"
            for k in found
            if found[k] != wanted[k]
        ]
        if lines:
            raise CheckpointError("\n  ".join([f"{here} is not the model of the configuration:", *lines]))
    _refuse_differing_copies(published)
    return published


def import_weights(
    published: PublishedWeights,
    out: Location,
    config: RunConfig | None = None,
    codec: CodecRecord | None = None,
    class_names: tuple[str, ...] = (),
    progress: Callable[[int], object] = lambda elements: None,
) -> Location:
    """Write a checkpoint of step 0 with these weights, equal EMA weights, and an optimizer state of zeros.

    Args:
        published: the weights to import.
        out: folder of checkpoints to write to.
        config: configuration of the run that will start from it; by default a minimal one with the model and the
            objective of published DiTs.
        codec: codec of the run's data; identity by default.
        class_names: class names of the run's data; numbers by default.
        progress: called with the number of elements of each tensor written.

    Returns:
        The checkpoint's folder, for `checkpoint.start_from`.

    Raises:
        CheckpointError: `out` already has checkpoints or cannot be written, or the weights cannot be read. Nothing is
            written then.
    """
    directory = CheckpointDirectory(out)
    if (latest := directory.latest()) is not None:
        raise CheckpointError(f"{out} already holds checkpoints (step {latest}): choose another folder")
    config = config or _minimal_config(published.model)
    state: CheckpointState = {
        "step": 0,
        "samples": 0,
        "config": config.model_dump(mode="json"),
        "identity": {k: v for k, v in config.identity().items() if k.startswith("model.") and ".gate." not in k},
        "codec": (codec or CodecRecord(name="identity", location="identity")).model_dump(mode="json"),
        "class_names": list(class_names) or [str(i) for i in range(published.model.num_classes)],
        "lost_shards": [],
        "layout": {"imported_from": str(published.where)},
    }

    def entries() -> Iterator[NamedEntries]:
        for name, tensor in published.stream():
            zeros = torch.zeros(()).expand(tensor.shape)
            yield name, {"weights": tensor, "exp_avg": zeros, "exp_avg_sq": zeros, "ema": tensor}
            progress(tensor.numel())

    return write_checkpoint(directory, state, entries())


def _open_folder(folder: Location) -> PublishedWeights:
    if not (folder / CONFIG).exists() and (folder / "transformer" / CONFIG).exists():
        folder = folder / "transformer"
    if not (folder / CONFIG).exists() or "format" in (tree := read_json_object(folder / CONFIG, CheckpointError)):
        raise CheckpointError(
            f"{folder} is not a folder of diffusers' DiT. From a run, a checkpoint or a merged folder of this project "
            f"nothing has to be imported: train with checkpoint.start_from={folder}"
        )
    model = parse_diffusers_config(tree, folder / CONFIG)
    reader = SafetensorsReader.of_folder(folder, "diffusion_pytorch_model")
    if model.depth > len(reader.shapes):  # before a model of that size is built
        raise CheckpointError(
            f"{folder / CONFIG} describes {model.depth:,} blocks, but there are only {len(reader.shapes):,} tensors"
        )
    mappings = map_parameters(diffusers_names, model)
    compare_shapes(reader.shapes, _external_shapes(mappings), folder)
    return PublishedWeights(folder, model, mappings, reader.read)


def _open_file(file: Location, model: ModelConfig | None, weights: Weights) -> PublishedWeights:
    if model is None:
        raise CheckpointError(f"{file} does not contain the number of heads: give a configuration too, as CONFIG")
    if model.residual != "adaln_zero" or model.condition != "class":
        raise CheckpointError(
            f"{file} can only hold an original DiT: set model.residual=adaln_zero and model.condition=class, "
            "or give the folder of a model of this project as checkpoint.start_from"
        )
    tensors = open_tensors(file, weights)
    model = model.model_copy(update={"timestep_spacing": "dit"})
    mappings = map_parameters(original_names, model)
    expected = _external_shapes(mappings)
    if POSITIONS in tensors.shapes:
        expected[POSITIONS] = (1, model.tokens, model.hidden_size)
    compare_shapes(tensors.shapes, expected, file)
    return PublishedWeights(file, model, mappings, tensors.read)


def _external_shapes(mappings: dict[str, ParameterMapping]) -> dict[str, Shape]:
    return {name: shape for mapping in mappings.values() for name, shape in mapping.external_shapes().items()}


def _refuse_differing_copies(published: PublishedWeights) -> None:
    for mapping in published.mappings.values():
        if any(len(names) > 1 for names in mapping.names):
            mapping.from_external(published.read)


def _minimal_config(model: ModelConfig) -> RunConfig:
    tree = {
        "model": model.model_dump(mode="json"),
        "diffusion": {"objective": "ddpm"},
        "data": {"train": NO_DATA},
        "run": {"dir": "run"},
    }
    return parse_config(tree, "of the imported model")
