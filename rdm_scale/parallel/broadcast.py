"""Batches of the rank of a model replica that reads data, broadcast to its tensor and pipeline peers."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from rdm_scale.batch import TrainingBatch
from rdm_scale.parallel.mesh import Mesh


def broadcast_batches(mesh: Mesh, batches: Iterator[TrainingBatch] | None) -> Iterator[TrainingBatch]:
    """Yield the reading rank's batches on every rank of its model replica, on its device. Collective over the replica.

    Args:
        batches: of the rank that reads (`mesh.reads_data`), None on its peers. The iteration ends on all together.
    """
    if mesh.replica_size == 1:
        assert batches is not None
        for batch in batches:
            yield batch.to(mesh.device)
        return
    source = dist.get_process_group_ranks(mesh.replica_group)[0]
    while True:
        own = None if batches is None else next(batches, None)
        tensors = {} if own is None else own.to(mesh.device).tensors()
        header = None if own is None else (own.step, {n: (t.shape, t.dtype) for n, t in tensors.items()})
        headers: list[Any] = [header]
        dist.broadcast_object_list(headers, source, group=mesh.replica_group, device=mesh.device)
        if headers[0] is None:
            return
        step, shapes = headers[0]
        for name, (shape, dtype) in shapes.items():
            if name not in tensors:
                tensors[name] = torch.empty(shape, dtype=dtype, device=mesh.device)
            tensors[name] = tensors[name].contiguous()
            dist.broadcast(tensors[name], source, group=mesh.replica_group)
        yield TrainingBatch.from_tensors(step, tensors)
