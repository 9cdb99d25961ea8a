"""Published weights of a DiT, turned into a checkpoint that training starts from."""

import math
import pickle
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rdm_scale.checkpoint.convert.checkpoint_writer import write_checkpoint
from rdm_scale.checkpoint.convert.dit_names import (
    Correspondence,
    correspondences,
    diffusers_names,
    model_of,
    original_names,
)
from rdm_scale.checkpoint.directory import CheckpointDirectory
from rdm_scale.checkpoint.sources import CONFIG, compare_shapes
from rdm_scale.codecs.record import CodecRecord
from rdm_scale.config import ModelConfig, RunConfig, flatten, parse_config
from rdm_scale.errors import CheckpointError
from rdm_scale.storage.location import Location
from rdm_scale.storage.safetensors_folder import SafetensorsReader, Shape, read_json

POSITIONS = "pos_embed"  # a fixed table, which the original DiT keeps among its weights
_UNREADABLE = (
    zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, TypeError, OSError,
)  # fmt: skip
NO_DATA = "none"  # data.train of a checkpoint that was imported without a configuration


@dataclass(frozen=True)
class Published:
    """Weights from elsewhere, not converted yet, that were seen to be all of `model` and nothing else."""

    where: Location
    model: ModelConfig
    pairs: dict[str, Correspondence]
    read: Callable[[str], Tensor]

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """(our name, fp32 tensor) of every parameter. Raises CheckpointError: copies of an embedder differ."""
        for name, pair in self.pairs.items():
            yield name, pair.to_ours(self.read)


def open_published(source: str, model: ModelConfig | None) -> Published:
    """The weights at `source`: a folder of diffusers' DiT (or a pipeline's, with a folder `transformer`), or a file
    with the names of the original DiT, .safetensors or .pt.

    Args:
        model: what the weights should be; needed for a file, which does not say the number of heads.

    Raises:
        CheckpointError: a file is missing, damaged or pickled objects; tensors are missing, strange or of other
            shapes; embedders of blocks differ; or it is another model than `model`, with the keys that differ.
    """
    here = Location(source)
    published = _open_folder(here) if here.is_dir() else _open_file(here, model)
    if model is not None:
        # gates are not used by adaln_zero, and may be set to anything
        there, wanted = (dict(flatten(m.model_dump(mode="json", exclude={"gate"}))) for m in (published.model, model))
        lines = [
            f"model.{k}: {there[k]} there, {wanted[k]} in the configuration" for k in there if there[k] != wanted[k]
        ]
        if lines:
            raise CheckpointError("\n  ".join([f"{here} is another model than the configuration's:", *lines]))
    _refuse_differing_copies(published)
    return published


def import_weights(
    published: Published,
    out: Location,
    config: RunConfig | None = None,
    codec: CodecRecord | None = None,
    class_names: tuple[str, ...] = (),
    progress: Callable[[int], object] = lambda elements: None,
) -> Location:
    """Writes a checkpoint of step 0 with the weights, averages equal to them, and moments of zero, to the folder of
    checkpoints `out`.

    Args:
        config: of the run that will start from it; None: one that has the model and published DiTs' objective only.
        codec: of the data, identity if not known.
        progress: called with the number of elements of each tensor written.

    Returns:
        The checkpoint's folder: what `checkpoint.resume` takes.

    Raises:
        CheckpointError: `out` has checkpoints already or cannot be written, or weights cannot be read. Nothing is left.
    """
    directory = CheckpointDirectory(out)
    if (latest := directory.latest()) is not None:
        raise CheckpointError(f"{out} holds checkpoints already (step {latest}): choose another folder")
    config = config or _bare_config(published.model)
    state = {
        "step": 0,
        "samples": 0,
        "config": config.model_dump(mode="json"),
        "identity": {k: v for k, v in config.identity().items() if k.startswith("model.") and ".gate." not in k},
        "codec": (codec or CodecRecord(name="identity", location="identity")).model_dump(mode="json"),
        "class_names": list(class_names) or [str(i) for i in range(published.model.num_classes)],
        "lost_shards": [],
        "layout": {"imported_from": str(published.where)},
    }

    def fields() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, tensor in published.stream():
            zeros = torch.zeros(()).expand(tensor.shape)
            yield name, {"weights": tensor, "exp_avg": zeros, "exp_avg_sq": zeros, "ema": tensor}
            progress(tensor.numel())

    return write_checkpoint(directory, state, fields())


def _open_folder(folder: Location) -> Published:
    if not (folder / CONFIG).exists() and (folder / "transformer" / CONFIG).exists():
        folder = folder / "transformer"
    model = model_of(read_json(folder / CONFIG), folder / CONFIG)
    reader = SafetensorsReader.of_folder(folder, "diffusion_pytorch_model")
    if model.depth > len(reader.shapes):  # before anything of that size is built
        raise CheckpointError(f"{folder} claims {model.depth:,} blocks and holds only {len(reader.shapes):,} tensors")
    pairs = correspondences(diffusers_names, model)
    compare_shapes(reader.shapes, _expected(pairs), folder)
    return Published(folder, model, pairs, reader.read)


def _open_file(file: Location, model: ModelConfig | None) -> Published:
    if model is None:
        raise CheckpointError(f"{file} does not say its number of heads: give a configuration too, as CONFIG")
    if model.residual != "adaln_zero" or model.condition != "class":
        raise CheckpointError(f"{file} can only be a model with model.residual=adaln_zero and model.condition=class")
    shapes, read = _tensors_of_file(file)
    model = model.model_copy(update={"timestep_spacing": "dit"})
    pairs = correspondences(original_names, model)
    expected = _expected(pairs)
    if POSITIONS in shapes:
        expected[POSITIONS] = (1, model.tokens, model.hidden_size)
    compare_shapes(shapes, expected, file)
    return Published(file, model, pairs, read)


def _tensors_of_file(file: Location) -> tuple[dict[str, Shape], Callable[[str], Tensor]]:
    if file.name.endswith(".safetensors"):
        reader = SafetensorsReader([file])
        return reader.shapes, reader.read
    if not file.name.endswith((".pt", ".pth")):
        raise CheckpointError(f"{file} is neither a folder of diffusers nor a .safetensors or .pt file")
    tensors = _unpickled(file)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.__getitem__


def _unpickled(file: Location) -> dict[str, Tensor]:
    """A state dict out of torch's own format, by the unpickler that makes tensors and containers and nothing else.

    The format before torch 1.6 is refused: it allocates what it claims. So are compressed files, which may unfold.
    """
    try:
        with file.open("rb") as content:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in zipfile.ZipFile(content).infolist()):
                raise ValueError("it is compressed")
            content.seek(0)
            found: Any = torch.load(content, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {file}") from None
    except _UNREADABLE as error:
        first = str(error).strip().splitlines()[:1]
        raise CheckpointError(
            f"{file} is not a plain file of tensors, and nothing else in it is run or loaded: {' '.join(first)}"
        ) from None
    for key in ("ema", "model"):  # as the original training saves them
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) and v.layout == torch.strided for k, v in found.items()
    ):
        raise CheckpointError(f"{file} does not hold a dictionary of names and dense tensors")
    return found


def _expected(pairs: dict[str, Correspondence]) -> dict[str, Shape]:
    return {name: shape for pair in pairs.values() for name, shape in pair.shapes().items()}


def _refuse_differing_copies(published: Published) -> None:
    for pair in published.pairs.values():
        if any(len(names) > 1 for names in pair.theirs):
            pair.to_ours(published.read)


def _bare_config(model: ModelConfig) -> RunConfig:
    tree = {
        "model": model.model_dump(mode="json"),
        "diffusion": {"objective": "ddpm"},
        "data": {"train": NO_DATA},
        "run": {"dir": "run"},
    }
    return parse_config(tree, "of the imported model")


def elements(published: Published) -> int:
    return sum(math.prod(pair.shape) for pair in published.pairs.values())
