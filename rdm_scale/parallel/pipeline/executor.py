"""Execution of a pipeline schedule, with the tensors that pass between chunks.

It is written by hand because torch.distributed.pipelining needs the shapes of all messages in advance and fixed for
the run, passes targets around its interface, and would need its backward overridden for ZeRO.

Both sides of a channel know the schedules of all ranks, so the receiver knows which message comes next, and keeps one
that arrives before it is needed.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rdm_scale.parallel.pipeline.boundary import BoundarySpec, BoundaryTensors, StageInputs, Tensors
from rdm_scale.parallel.pipeline.channels import Channels
from rdm_scale.parallel.pipeline.schedules import BACKWARD, FORWARD, Action, ChunkPlacement, Schedule

ActionHook = Callable[[Action | None], None]


class ChunkOutputs(NamedTuple):
    """Outputs of a chunk's forward in training: `boundary` or, of the last chunk, `loss` (a scalar)."""

    boundary: BoundaryTensors | None = None
    local_skips: Tensors = ()
    loss: Tensor | None = None


class ChunkRunner(Protocol):
    """Forwards and backwards of this rank's chunks, as a `Pipeline` calls them."""

    def forward(self, chunk: int, micro_batch: int, inputs: StageInputs) -> ChunkOutputs:
        """Run the forward of a chunk; tensors of `inputs` are leaves that require a gradient."""

    def backward(self, micro_batch: int, outputs: Tensors, gradients: tuple[Tensor | None, ...]) -> None:
        """Backpropagate from outputs of a chunk for a micro-batch; None as the gradient of the loss.

        A chunk's backwards come in the order of the micro-batches.
        """

    def boundary_spec(self, micro_batch: int) -> BoundarySpec:
        """Shapes and dtypes of the tensors that pass between chunks."""


class Message(NamedTuple):
    """Boundary tensors that a rank sends to another one."""

    action: Action  # that waits for them
    source: int  # rank of the pipeline
    target: int


class Pipeline:
    """One rank's part of a schedule.

    Attributes:
        on_action: measurement hook, called before each action with it and, with None, after the last one, when all
            gradients are accumulated and not yet reduced over the data-parallel ranks.
    """

    def __init__(self, placement: ChunkPlacement, schedule: Schedule, rank: int, channels: Channels | None) -> None:
        self.placement, self.rank, self.channels = placement, rank, channels
        self.actions = schedule[rank]
        self.expected = {
            source: [message.action for message in _messages(schedule[source], placement) if message.target == rank]
            for source in range(placement.ranks)
            if source != rank
        }
        self.on_action: ActionHook | None = None

    def run(self, chunks: ChunkRunner) -> None:
        """Run all forwards and backwards of one step. Collective over the pipeline."""
        step = _Step(self, chunks)
        for action in self.actions:
            if self.on_action is not None:
                self.on_action(action)
            if action.kind is FORWARD:
                step.forward(action)
            else:
                step.backward(action)
        if self.on_action is not None:
            self.on_action(None)
        if self.channels is not None:
            self.channels.wait()


class _Step:
    """Tensors in flight during one step."""

    def __init__(self, pipeline: Pipeline, chunks: ChunkRunner) -> None:
        self.pipeline, self.placement, self.chunks = pipeline, pipeline.placement, chunks
        self.inputs: dict[Action, StageInputs] = {}  # leaves of forwards, by the backward that they wait for
        self.outputs: dict[Action, ChunkOutputs] = {}
        self.arrived: dict[Action, BoundaryTensors] = {}  # by the action that they wait for
        self.local_skips: dict[Action, Tensors] = {}
        self.expected = {source: iter(actions) for source, actions in pipeline.expected.items()}

    def forward(self, action: Action) -> None:
        boundary = self._receive(action, action.chunk - 1) if action.chunk else None
        skips = self.local_skips.pop(action, ())
        inputs = StageInputs(None if boundary is None else BoundaryTensors(*_leaves(boundary)), _leaves(skips))
        outputs = self.chunks.forward(action.chunk, action.micro_batch, inputs)
        backward = action._replace(kind=BACKWARD)
        self.inputs[backward], self.outputs[backward] = inputs, outputs
        if outputs.boundary is not None:
            detached = BoundaryTensors(*(tensor.detach() for tensor in outputs.boundary))
            self._send(action._replace(chunk=action.chunk + 1), detached)
        if outputs.local_skips:
            self.local_skips[action._replace(chunk=self.placement.partner_of(action.chunk))] = outputs.local_skips

    def backward(self, action: Action) -> None:
        outputs = self.outputs.pop(action)
        if outputs.boundary is None:
            assert outputs.loss is not None
            self.chunks.backward(action.micro_batch, (outputs.loss,), (None,))
        else:
            gradients = self._receive(action, action.chunk + 1)
            skip_gradients = self.local_skips.pop(action, ())
            of_outputs = (*gradients, *skip_gradients)
            self.chunks.backward(action.micro_batch, (*outputs.boundary, *outputs.local_skips), of_outputs)
        inputs = self.inputs.pop(action)
        if inputs.boundary is not None:
            self._send(action._replace(chunk=action.chunk - 1), BoundaryTensors(*map(_gradient, inputs.boundary)))
        if inputs.local_skips:
            partner = action._replace(chunk=self.placement.partner_of(action.chunk))
            self.local_skips[partner] = tuple(map(_gradient, inputs.local_skips))

    def _send(self, action: Action, tensors: BoundaryTensors) -> None:
        """Pass tensors to the rank that runs `action`."""
        target = self.placement.rank_of(action.chunk)
        if target == self.pipeline.rank:
            self.arrived[action] = tensors
        else:
            assert self.pipeline.channels is not None
            self.pipeline.channels.send(target, tensors)

    def _receive(self, action: Action, from_chunk: int) -> BoundaryTensors:
        """Take the tensors that `action` waits for, and keep those of other actions that arrive before."""
        source = self.placement.rank_of(from_chunk)
        while action not in self.arrived:
            assert self.pipeline.channels is not None
            arriving = next(self.expected[source])
            spec = self.chunks.boundary_spec(arriving.micro_batch)
            self.arrived[arriving] = self.pipeline.channels.receive(source, spec)
        return self.arrived.pop(action)


def _leaves(tensors: Tensors) -> Tensors:
    return tuple(tensor.detach().requires_grad_() for tensor in tensors)


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _messages(actions: list[Action], placement: ChunkPlacement) -> list[Message]:
    """Messages of a rank that runs these actions, in the order of sending."""
    messages = []
    for action in actions:
        next_chunk = action.chunk + (1 if action.kind is FORWARD else -1)
        source = placement.rank_of(action.chunk)
        if 0 <= next_chunk < placement.chunks and placement.rank_of(next_chunk) != source:
            target = placement.rank_of(next_chunk)
            messages.append(Message(action._replace(chunk=next_chunk), source, target))
    return messages
