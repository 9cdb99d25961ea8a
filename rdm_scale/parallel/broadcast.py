"""One rank of each replica of the model reads the data; its tensor and pipeline peers are given it."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from rdm_scale.batch import TrainingBatch
from rdm_scale.parallel.mesh import Mesh


def shared(mesh: Mesh, batches: Iterator[TrainingBatch] | None) -> Iterator[TrainingBatch]:
    """The reading rank's batches, on every rank of its replica, on their devices. Collective over the replica.

    Args:
        batches: of the rank that reads (`mesh.reads_data`); None on its peers. Where it ends it ends for all.
    """
    if mesh.tensor_size * mesh.pipeline_size == 1:
        assert batches is not None
        for batch in batches:
            yield batch.to(mesh.device)
        return
    source = dist.get_process_group_ranks(mesh.replica_group)[0]
    while True:
        mine = None if batches is None else next(batches, None)
        tensors = {} if mine is None else mine.to(mesh.device).tensors()
        described = None if mine is None else (mine.step, {n: (t.shape, t.dtype) for n, t in tensors.items()})
        box: list[Any] = [described]
        dist.broadcast_object_list(box, source, group=mesh.replica_group, device=mesh.device)
        if box[0] is None:
            return
        step, shapes = box[0]
        for name, (shape, dtype) in shapes.items():
            if name not in tensors:
                tensors[name] = torch.empty(shape, dtype=dtype, device=mesh.device)
            tensors[name] = tensors[name].contiguous()
            dist.broadcast(tensors[name], source, group=mesh.replica_group)
        yield TrainingBatch.of_tensors(step, tensors)
