"""Between a parallel model and a checkpoint: every rank writes and reads its own ranges, nothing is gathered."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rdm_scale.checkpoint.directory import CheckpointDirectory, open_checkpoint
from rdm_scale.checkpoint.rectangles import Piece, rectangles_of_range
from rdm_scale.checkpoint.tensors import write_tensors
from rdm_scale.data.storage import Location
from rdm_scale.errors import CheckpointError

if TYPE_CHECKING:
    from rdm_scale.parallel.mesh import Mesh
    from rdm_scale.parallel.zero import Shard, ZeroEngine


def save(
    directory: CheckpointDirectory,
    state: Mapping[str, Any],
    engine: "ZeroEngine",
    ema: list[Tensor],
    mesh: "Mesh",
    keep: int,
) -> None:
    """Writes the checkpoint of `state["step"]`, complete on return, and removes all but the newest `keep`. Collective.

    Raises:
        CheckpointError: on every rank when one cannot write; what was written of this checkpoint is removed, and
            earlier ones are untouched.
    """
    step = state["step"]
    _together(mesh, lambda: directory.begin(step) if mesh.is_first else None)
    fields = {"weights": engine.masters, **engine.moments(), "ema": ema}
    flat = {name: torch.cat([part.cpu() for part in parts]) for name, parts in fields.items()}
    try:
        records = _together(
            mesh, lambda: write_tensors(directory.folder(step), mesh.rank, pieces_of(engine.writes), flat)
        )
        files = [record for rank_records in records for record in rank_records]
        _together(mesh, lambda: directory.commit(step, state, files) if mesh.is_first else None)
    except CheckpointError:
        if mesh.is_first:
            directory.abandon(step)
        raise
    _together(mesh, lambda: directory.prune(keep) if mesh.is_first else None)


def load(url: str, engine: "ZeroEngine", ema: list[Tensor]) -> None:
    """Sets weights, moments and averages from a checkpoint that any layout wrote. Collective.

    Raises:
        CheckpointError: it is incomplete, damaged, or lacks a part of this model.
    """
    state, reader = open_checkpoint(Location(url))
    pieces = pieces_of(engine.shards)
    size = sum(flat.numel() for flat in ema)

    def fill(field: str, flats: list[Tensor]) -> None:
        whole = reader.fill(pieces, field, torch.zeros(size))
        for flat, part in zip(flats, whole.split([flat.numel() for flat in flats]), strict=True):
            flat.copy_(part)

    for field, flats in (*engine.moments(state["step"]).items(), ("ema", ema), ("weights", engine.masters)):
        fill(field, flats)
    engine.set_masters(engine.masters)


def pieces_of(shards: "list[Shard]") -> list[Piece]:
    """A rank's ranges as rectangles of the logical tensors."""
    pieces = []
    for shard in shards:
        start, whole, offset = shard.start, shard.part.whole(shard.shape), shard.part.offset(shard.shape)
        for rectangle in rectangles_of_range(shard.shape, shard.first, shard.count):
            pieces.append(Piece(shard.name, whole, rectangle.shifted(offset), start))
            start += rectangle.numel
    return pieces


def _together(mesh: "Mesh", work: Any) -> list[Any]:
    """Runs `work` on every rank and returns all results, or raises on all ranks what failed on the first that did."""
    outcome: tuple[Any, str | None]
    try:
        outcome = (work(), None)
    except (CheckpointError, OSError) as error:
        outcome = (None, str(error))
    outcomes = mesh.gather(outcome)
    failures = [message for _, message in outcomes if message is not None]
    if failures:
        raise CheckpointError(failures[0])
    return [result for result, _ in outcomes]
