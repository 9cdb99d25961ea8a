"""One folder of weights that other programs read, out of checkpoints of any layout; streamed, so that memory stays
bounded whatever the size of the model."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from rdm_scale.checkpoint.convert.dit_names import config_of, correspondences, diffusers_names
from rdm_scale.checkpoint.sources import CONFIG, MERGED, MergedConfig, ModelSource
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
    """Writes the mean of the sources' weights, of one source just these, as a merged folder; `config.json` comes last.

    Args:
        sources: of one model; the first one's configuration is written, its step is that of the newest.
        out: a folder that does not exist yet or is empty.
        dtype: of the file, fp32 or bf16; the mean is taken in fp64.
        progress: called with the number of elements done, tensor by tensor.

    Raises:
        CheckpointError: the sources are of different models, `out` is taken or cannot be written, or a source is
            damaged; nothing is left in `out` then.
    """
    first = sources[0]
    for other in sources[1:]:
        mine, theirs = (dict(flatten(s.config.model.model_dump(mode="json"))) for s in (first, other))
        if differing := [key for key in mine if mine[key] != theirs[key]]:
            raise CheckpointError(
                f"{first.where} and {other.where} cannot be averaged: they differ in model.{', model.'.join(differing)}"
            )
    config = MergedConfig(
        weights=first.weights,
        dtype=str(dtype).removeprefix("torch."),
        step=max(source.step for source in sources),
        averaged=tuple(str(source.where) for source in sources) if len(sources) > 1 else (),
        config=first.config.model_dump(mode="json"),
        codec=first.codec,
        class_names=first.class_names,
        text=first.text,
    )
    _write(
        out, MERGED, first.shapes, _mean(sources), dtype, max_file_bytes, progress,
        config.model_dump_json(indent=1).encode(),
    )  # fmt: skip


def export_diffusers(
    source: ModelSource,
    out: Location,
    dtype: torch.dtype = torch.float32,
    max_file_bytes: int = MAX_FILE_BYTES,
    progress: Progress = lambda elements: None,
) -> None:
    """Writes a folder that `diffusers.DiTTransformer2DModel.from_pretrained` loads.

    Raises:
        CheckpointError: DiT of diffusers cannot express the model, and what to do instead; or as `merge`.
    """
    config = config_of(source.config.model)
    pairs = correspondences(diffusers_names, source.config.model)
    shapes: dict[str, Shape] = {}
    for pair in pairs.values():
        shapes |= pair.shapes()
    renamed = (named for name, tensor in source.stream() for named in pairs[name].to_theirs(tensor))
    _write(out, "diffusion_pytorch_model", shapes, renamed, dtype, max_file_bytes, progress, config)


def elements(sources: Sequence[ModelSource]) -> int:
    """Elements of one of the sources, for showing progress."""
    return sum(map(math.prod, sources[0].shapes.values()))


def refuse_taken(out: Location) -> None:
    """Raises CheckpointError unless `out` is free to be written to."""
    try:
        names = out.names()
        is_file = not names and out.exists() and not out.is_dir()
    except OSError as error:
        raise CheckpointError(f"cannot write to {out}: {error.strerror or error}") from error
    if names:
        raise CheckpointError(f"{out} is not empty (it holds {names[0]}): choose another folder")
    if is_file:
        raise CheckpointError(f"{out} is a file: choose another place")


def _mean(sources: Sequence[ModelSource]) -> Iterator[tuple[str, Tensor]]:
    if len(sources) == 1:
        yield from sources[0].stream()
        return
    for parts in zip(*(source.stream() for source in sources), strict=True):
        total = parts[0][1].double()
        for _, tensor in parts[1:]:
            total += tensor
        yield parts[0][0], (total / len(parts)).float()


def _write(
    out: Location,
    stem: str,
    shapes: dict[str, Shape],
    tensors: Iterator[tuple[str, Tensor]],
    dtype: torch.dtype,
    max_file_bytes: int,
    progress: Progress,
    config: bytes,
) -> None:
    refuse_taken(out)
    try:
        write_safetensors(
            out, stem, shapes, tensors, dtype, max_file_bytes, lambda done: progress(done // dtype.itemsize)
        )
        (out / CONFIG).write(config)
    except BaseException as error:
        if out.exists():
            out.remove()
        if isinstance(error, OSError):
            raise CheckpointError(f"cannot write {out / CONFIG}: {error.strerror or error}") from error
        raise
