"""Point-to-point channels between the ranks of a pipeline.

Messages between two ranks arrive in the order in which they were sent, each direction on a process group of its own:
NCCL has no tags, and two ranks that send to each other over one communicator can wait for each other forever.
"""

import time
from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from rdm_scale.parallel.mesh import Mesh
from rdm_scale.parallel.pipeline.boundary import BoundarySpec, BoundaryTensors, TensorSpec


class Channels:
    """Messages between the ranks of one pipeline, first in, first out in each direction.

    Attributes:
        groups: the process groups of the two directions.
        waited_s: seconds spent in `receive` so far, for measurements.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.rank, self.device = mesh.pipeline_rank, mesh.device
        self.waited_s = 0.0
        self._global_ranks = dist.get_process_group_ranks(mesh.pipeline_group)
        # Every rank makes every group, in the same order, as torch requires.
        pipelines = mesh.world_size // mesh.pipeline_size
        downward, _ = dist.new_subgroups_by_enumeration(
            [list(range(first, mesh.world_size, pipelines)) for first in range(pipelines)], timeout=mesh.timeout
        )
        self.groups = (mesh.pipeline_group, downward)  # to higher ranks, to lower ranks
        self._sends: deque[tuple[dist.Work, Tensor]] = (
            deque()
        )  # not known to be complete, with the tensors to keep alive

    def send(self, target: int, tensors: BoundaryTensors) -> None:
        """Send to a rank of the pipeline, asynchronously."""
        for tensor in tensors:
            tensor = tensor.contiguous()
            work = dist.isend(tensor, self._global_ranks[target], group=self._group(self.rank, target))
            assert work is not None, "this rank belongs to the group"
            self._sends.append((work, tensor))
        while self._sends and self._sends[0][0].is_completed():
            self._sends.popleft()

    def receive(self, source: int, spec: BoundarySpec) -> BoundaryTensors:
        """Receive the next message of a rank of the pipeline."""
        began = time.perf_counter()
        received = BoundaryTensors(self._receive(source, spec.hidden), self._receive(source, spec.condition))
        self.waited_s += time.perf_counter() - began
        return received

    def wait(self) -> None:
        """Wait until everything sent has arrived."""
        while self._sends:
            self._sends.popleft()[0].wait()

    def _receive(self, source: int, spec: TensorSpec) -> Tensor:
        tensor = torch.empty(spec.shape, dtype=spec.dtype, device=self.device)
        dist.recv(tensor, self._global_ranks[source], group=self._group(source, self.rank))
        return tensor

    def _group(self, source: int, target: int) -> dist.ProcessGroup:
        return self.groups[0] if source < target else self.groups[1]
