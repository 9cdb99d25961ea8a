"""The pipeline axis: carries out a schedule, with the tensors that pass between chunks.

Written by hand, since torch.distributed.pipelining wants the shapes of all messages beforehand and fixed for the run,
targets smuggled past it, and its backward overridden for ZeRO; what is needed of it is the forty lines of `Pipeline`.
Its orders of operations are those of `schedules`.

Messages between two ranks arrive in the order in which they were sent, each direction on a process group of its own:
NCCL knows no tags, and two ranks that send to each other over one communicator wait for each other forever. Both sides
know all ranks' orders, so the receiver knows which message comes next and keeps what comes too early.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from rdm_scale.parallel.mesh import Mesh
from rdm_scale.parallel.pipeline.schedules import Operation, Placement

Tensors = tuple[Tensor, ...]
Shapes = Sequence[tuple[tuple[int, ...], torch.dtype]]


class Outputs(NamedTuple):
    """What a chunk's forward hands on: `onward` to the next chunk, `across` to its mirror (chunk n - 1 - k), which V
    placement puts on the same rank: these tensors never travel, nor do their gradients. The last chunk's loss is its
    only output."""

    onward: Tensors
    across: Tensors = ()


class Message(NamedTuple):
    """The inputs of a chunk's forward, or the gradients of its outputs, for one micro-batch."""

    operation: Operation  # that waits for it
    source: int  # rank of the pipeline
    target: int


class Chunks(Protocol):
    """The chunks of this rank, as a `Pipeline` calls them."""

    def forward(self, chunk: int, micro_batch: int, inputs: Tensors) -> Outputs:
        """Inputs are what the chunk before handed onward (none for the first), then what the mirror handed across."""

    def backward(self, outputs: Tensors, gradients: tuple[Tensor | None, ...]) -> None:
        """Backpropagates from a chunk's outputs."""

    def shapes(self, micro_batch: int) -> Shapes:
        """Of the tensors that pass between chunks."""


class Links:
    """Messages between the ranks of one pipeline, first in, first out in each direction.

    Attributes:
        waited_s: seconds spent in `receive` so far, for measurements.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.rank, self.device = mesh.pipeline_rank, mesh.device
        self._global_ranks = dist.get_process_group_ranks(mesh.pipeline_group)
        self._up = mesh.pipeline_group
        # All ranks make all groups, in the same order: torch wants it so.
        pipelines = mesh.world_size // mesh.pipeline_size
        self._down, _ = dist.new_subgroups_by_enumeration(
            [list(range(first, mesh.world_size, pipelines)) for first in range(pipelines)], timeout=mesh.timeout
        )
        self._under_way: deque[tuple[Any, Tensor]] = deque()
        self.waited_s = 0.0

    @property
    def groups(self) -> list[Any]:
        """Process groups that messages travel on."""
        return [self._up, self._down]

    def send(self, target: int, tensors: Tensors) -> None:
        """Returns at once."""
        for tensor in tensors:
            tensor = tensor.contiguous()
            work = dist.isend(tensor, self._global_ranks[target], group=self._group(self.rank, target))
            self._under_way.append((work, tensor))
        while self._under_way and self._under_way[0][0].is_completed():
            self._under_way.popleft()

    def receive(self, source: int, shapes: Shapes) -> Tensors:
        began = time.perf_counter()
        tensors = tuple(torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in shapes)
        for tensor in tensors:
            dist.recv(tensor, self._global_ranks[source], group=self._group(source, self.rank))
        self.waited_s += time.perf_counter() - began
        return tensors

    def wait(self) -> None:
        """Until all that was sent has arrived."""
        while self._under_way:
            self._under_way.popleft()[0].wait()

    def _group(self, source: int, target: int) -> Any:
        return self._up if source < target else self._down


class Pipeline:
    """One rank's share of a schedule.

    Attributes:
        on_action: measurement hook, called before each action with it and, with None, after the last one, when all
            gradients are accumulated and not yet reduced over the data-parallel ranks.
    """

    def __init__(self, place: Placement, orders: list[list[Operation]], rank: int, links: Links | None) -> None:
        self.place, self.rank, self.links = place, rank, links
        self.order = orders[rank]
        self.expected = {
            source: [message.operation for message in _messages(orders[source], place) if message.target == rank]
            for source in range(place.ranks)
            if source != rank
        }
        self.on_action: Callable[[Operation | None], None] | None = None

    def run(self, chunks: Chunks) -> None:
        """All forwards and backwards of one step. Collective over the pipeline."""
        step = _Step(self, chunks)
        for operation in self.order:
            if self.on_action is not None:
                self.on_action(operation)
            (step.backward if operation.backward else step.forward)(operation)
        if self.on_action is not None:
            self.on_action(None)
        if self.links is not None:
            self.links.wait()


class _Step:
    """What is on its way during one step."""

    def __init__(self, pipeline: Pipeline, chunks: Chunks) -> None:
        self.pipeline, self.place, self.chunks = pipeline, pipeline.place, chunks
        self.last = pipeline.place.chunks - 1
        self.inputs: dict[tuple[int, int], Tensors] = {}  # leaves, by (chunk, micro-batch)
        self.outputs: dict[tuple[int, int], Tensors] = {}
        self.arrived: dict[Operation, Tensors] = {}
        self.crossed: dict[Operation, Tensors] = {}  # between mirrors
        self.expected = {source: iter(queue) for source, queue in pipeline.expected.items()}

    def forward(self, operation: Operation) -> None:
        _, chunk, micro_batch = operation
        onward = self._take(operation, chunk - 1) if chunk else ()
        inputs = tuple(t.detach().requires_grad_() for t in (*onward, *self.crossed.pop(operation, ())))
        outputs = self.chunks.forward(chunk, micro_batch, inputs)
        self.inputs[chunk, micro_batch] = inputs
        self.outputs[chunk, micro_batch] = (*outputs.onward, *outputs.across)
        if chunk != self.last:
            self._give(Operation(False, chunk + 1, micro_batch), tuple(t.detach() for t in outputs.onward))
        if outputs.across:
            self.crossed[Operation(False, self.place.mirror_of(chunk), micro_batch)] = outputs.across

    def backward(self, operation: Operation) -> None:
        _, chunk, micro_batch = operation
        outputs = self.outputs.pop((chunk, micro_batch))
        gradients: tuple[Tensor | None, ...] = (None,)
        if chunk != self.last:
            gradients = (*self._take(operation, chunk + 1), *self.crossed.pop(operation, ()))
        self.chunks.backward(outputs, gradients)
        inputs = self.inputs.pop((chunk, micro_batch))
        came_onward = len(self.chunks.shapes(micro_batch)) if chunk else 0
        back = tuple(torch.zeros_like(t) if t.grad is None else t.grad for t in inputs)
        if chunk:
            self._give(Operation(True, chunk - 1, micro_batch), back[:came_onward])
        if len(back) > came_onward:
            self.crossed[Operation(True, self.place.mirror_of(chunk), micro_batch)] = back[came_onward:]

    def _give(self, operation: Operation, tensors: Tensors) -> None:
        target = self.place.rank_of(operation.chunk)
        if target == self.pipeline.rank:
            self.arrived[operation] = tensors
        else:
            assert self.pipeline.links is not None
            self.pipeline.links.send(target, tensors)

    def _take(self, operation: Operation, from_chunk: int) -> Tensors:
        source = self.place.rank_of(from_chunk)
        while operation not in self.arrived:
            assert self.pipeline.links is not None
            coming = next(self.expected[source])
            self.arrived[coming] = self.pipeline.links.receive(source, self.chunks.shapes(coming.micro_batch))
        return self.arrived.pop(operation)


def _messages(order: list[Operation], place: Placement) -> list[Message]:
    """What a rank that works in this order sends to others, in the order of sending."""
    messages = []
    for backward, chunk, micro_batch in order:
        to = chunk - 1 if backward else chunk + 1
        if 0 <= to < place.chunks and place.rank_of(to) != place.rank_of(chunk):
            messages.append(Message(Operation(backward, to, micro_batch), place.rank_of(chunk), place.rank_of(to)))
    return messages
