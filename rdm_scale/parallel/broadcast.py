"""Broadcast of batches within a model replica, from the rank that reads data to its peers."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist

from rdm_scale.batch import TrainingBatch
from rdm_scale.parallel.mesh import Mesh
from rdm_scale.parallel.pipeline.boundary import TensorSpec


class BatchHeader(NamedTuple):
    """Message that precedes the tensors of a batch."""

    step: int
    specs: dict[str, TensorSpec]


def broadcast_batches(mesh: Mesh, batches: Iterator[TrainingBatch] | None) -> Iterator[TrainingBatch]:
    """Yield the reading rank's batches on every rank of its model replica, on its device. Collective over the replica.

    Args:
        batches: batches on the rank that reads (`mesh.reads_data`), None on its peers. The iteration ends on all ranks
            at the same time.
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
        headers: list[BatchHeader | None] = [None]  # None ends the iteration
        if own is not None:
            specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
            headers = [BatchHeader(own.step, specs)]
        dist.broadcast_object_list(headers, source, group=mesh.replica_group, device=mesh.device)
        header = headers[0]
        if header is None:
            return
        for name, spec in header.specs.items():
            if name not in tensors:
                tensors[name] = torch.empty(spec.shape, dtype=spec.dtype, device=mesh.device)
            tensors[name] = tensors[name].contiguous()
            dist.broadcast(tensors[name], source, group=mesh.replica_group)
        yield TrainingBatch.from_tensors(header.step, tensors)
