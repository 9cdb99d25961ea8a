"""Merge checkpoints of any layout into one folder of weights that other programs read.

Tensors are streamed one by one, so that memory stays bounded for models of any size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rdm_scale.checkpoint.convert.diffusers_config import encode_diffusers_config
from rdm_scale.checkpoint.convert.parameter_mapping import diffusers_names, map_parameters
from rdm_scale.checkpoint.model_source import CONFIG, MERGED, MergedConfig, ModelSource
from rdm_scale.config import flatten
from rdm_scale.errors import CheckpointError
from rdm_scale.storage.location import Location
from rdm_scale.storage.safetensors_folder import Shape, write_safetensors

MAX_FILE_BYTES = 5 * 10**9

Progress = Callable[[int], object]


def merge(
    sources: Sequence[ModelSource],
    out: Location,
    dtype: torch.dtype = torch.float32,
    max_file_bytes: int = MAX_FILE_BYTES,
    progress: Progress = lambda elements: None,
) -> None:
    """Write the mean of the sources' weights to a merged folder; `config.json` is written last.

    Args:
        sources: checkpoints of one model. The configuration of the first one and the step of the newest are written.
        out: a folder that does not exist or is empty.
        dtype: type of the stored weights, fp32 or bf16. The mean is computed in fp64.
        max_file_bytes: larger weights are split into several files.
        progress: called with the number of elements of each tensor written.

    Raises:
        CheckpointError: the sources are different models, `out` is not empty or cannot be written, or a source is
            damaged. Nothing is left in `out` then.
    """
    first = sources[0]
    for other in sources[1:]:
        if other.weights != first.weights:
            raise CheckpointError(
                f"{first.where} holds {first.weights} weights and {other.where} {other.weights} ones: average weights "
                "of one kind (--weights)"
            )
        a, b = (dict(flatten(s.config.model.model_dump(mode="json"))) for s in (first, other))
        if differing := [key for key in a if a[key] != b[key]]:
            raise CheckpointError(
                f"{first.where} and {other.where} cannot be averaged: they differ in model.{', model.'.join(differing)}"
            )
    config = MergedConfig(
        weights=first.entry,
        dtype=str(dtype).removeprefix("torch."),
        step=max(source.step for source in sources),
        averaged=tuple(str(source.where) for source in sources) if len(sources) > 1 else (),
        config=first.config.model_dump(mode="json"),
        codec=first.codec,
        class_names=first.class_names,
        text=first.text,
    )
    folder = _OutputFolder(out, MERGED, dtype, max_file_bytes, progress)
    folder.write(first.shapes, _mean(sources), config.model_dump_json(indent=1).encode())


def export_diffusers(
    source: ModelSource,
    out: Location,
    dtype: torch.dtype = torch.float32,
    max_file_bytes: int = MAX_FILE_BYTES,
    progress: Progress = lambda elements: None,
) -> None:
    """Write a folder that `diffusers.DiTTransformer2DModel.from_pretrained` loads.

    Args and errors are those of `merge`; CheckpointError is also raised if diffusers' DiT cannot express the model.
    """
    config = encode_diffusers_config(source.config.model)
    mappings = map_parameters(diffusers_names, source.config.model)
    shapes: dict[str, Shape] = {}
    for mapping in mappings.values():
        shapes |= mapping.external_shapes()
    tensors = (named for name, tensor in source.stream() for named in mappings[name].to_external(tensor))
    _OutputFolder(out, "diffusion_pytorch_model", dtype, max_file_bytes, progress).write(shapes, tensors, config)


def refuse_occupied(out: Location) -> None:
    """Raise CheckpointError if `out` is a file or a folder that is not empty."""
    try:
        names = out.names()
        is_file = not names and out.exists() and not out.is_dir()
    except OSError as error:
        raise CheckpointError(f"cannot write to {out}: {error.strerror or error}") from error
    if names:
        raise CheckpointError(f"{out} is not empty (it contains {names[0]}): choose another folder")
    if is_file:
        raise CheckpointError(f"{out} is a file: choose another folder")


def _mean(sources: Sequence[ModelSource]) -> Iterator[tuple[str, Tensor]]:
    if len(sources) == 1:
        yield from sources[0].stream()
        return
    for (name, first), *others in zip(*(source.stream() for source in sources), strict=True):
        total = first.double()
        for _, tensor in others:
            total += tensor
        yield name, (total / len(sources)).float()


@dataclass(frozen=True)
class _OutputFolder:
    """Writer of a folder with weights and `config.json`."""

    out: Location
    stem: str  # of the file names
    dtype: torch.dtype
    max_file_bytes: int
    progress: Progress

    def write(self, shapes: dict[str, Shape], tensors: Iterator[tuple[str, Tensor]], config: bytes) -> None:
        """Write the weights, then `config.json`; after an error, remove the folder."""
        refuse_occupied(self.out)
        try:
            write_safetensors(
                self.out, self.stem, shapes, tensors, self.dtype, self.max_file_bytes,
                lambda done: self.progress(done // self.dtype.itemsize),
            )  # fmt: skip
            (self.out / CONFIG).write(config)
        except BaseException as error:
            if self.out.exists():
                self.out.remove()
            if isinstance(error, OSError):
                raise CheckpointError(f"cannot write {self.out / CONFIG}: {error.strerror or error}") from error
            raise
