"""CUDA graphs (`train.cuda_graphs`): the forward and backward of a micro-batch, recorded once and replayed.

A replay launches all kernels at once, where Python would take about 0.1 ms for each block. What is recorded reads the
micro-batch from fixed tensors and leaves gradients in the engine's buffers: one graph for the first micro-batch of a
step, which overwrites them, and one for further ones, which add to them. There is a pair of graphs for each shape of a
micro-batch; all share one pool of memory.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rdm_scale.batch import TrainingBatch
from rdm_scale.config import RunConfig
from rdm_scale.errors import ConfigError
from rdm_scale.parallel.mesh import Mesh
from rdm_scale.parallel.plan import FILLED, ParallelPlan

_WARM_UPS = 2  # runs before a recording, in which libraries allocate and kernels are compiled

DEVICES = ("cuda",)  # on which graphs can be recorded; a test with a stand-in for `record` adds the CPU

Report = Callable[[str], None]
Body = Callable[[TrainingBatch], Tensor]  # forward and backward of a micro-batch; returns the loss of each sample


class GradientBuffers(Protocol):
    """Engine whose backwards leave gradients in buffers that stay in place; zero.stage3_gathered has one."""

    @property
    def filled(self) -> set[int]:
        """Parameters, by number, whose buffer holds a gradient of this step: a backward adds to it, else overwrites."""

    def discard_gradients(self) -> None:
        """Discard the gradients of this step."""


class Recording(NamedTuple):
    """A graph, with the tensor in which its replay leaves the loss of each sample."""

    replay: Callable[[], None]
    losses: Tensor


class _Graph(NamedTuple):
    inputs: list[Tensor]
    recording: Recording
    filled: frozenset[int]


def record(body: Callable[[], Tensor], pool: Any) -> Recording:
    """Record what `body` gives the GPU to do; it runs a few times before, but its effects are not those of a replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            body()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as NCCL's and the prefetcher, may call what a recording forbids.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        losses = body()
    return Recording(graph.replay, losses)


def obstacle(config: RunConfig, mesh: Mesh, plan: ParallelPlan) -> str | None:
    """Name what keeps a run from recording graphs, or None."""
    parallel = config.parallel
    stage = plan.stages[mesh.pipeline_rank]
    if mesh.device.type not in DEVICES:
        return "there is no GPU"
    if not plan.keep_gathered:
        return "they need parallel.zero_stage=3 with parameters kept gathered: hooks of DeepSpeed cannot be recorded"
    if parallel.pipeline > 1 or parallel.tensor > 1:
        return "messages between pipeline stages and tensor-parallel ranks are not recorded"
    if parallel.offload != "none":
        return "parallel.offload moves gradients to the host"
    if mesh.data_size > 1 and parallel.overlap:
        return "parallel.overlap=true reduces gradients within the backward"
    if plan.memory is not None and stage.total + stage.activations > FILLED * plan.memory:
        return "memory for activations is needed twice, in the graph and for steps that are not replayed"
    return None


def wants_graphs(config: RunConfig, mesh: Mesh, plan: ParallelPlan, report: Report) -> bool:
    """Decide whether to record graphs.

    Raises:
        ConfigError: `train.cuda_graphs=true` and something keeps the run from it.
    """
    choice = config.train.cuda_graphs
    reason = None if choice == "false" else obstacle(config, mesh, plan)
    if choice == "true" and reason is not None:
        raise ConfigError(f"train.cuda_graphs=true: {reason}; set it to auto or false")
    if reason is not None and mesh.device.type in DEVICES:
        report(f"CUDA graphs: no: {reason}")
    return choice != "false" and reason is None


class MicroBatchGraphs:
    """The recorded graphs of one rank.

    Args:
        limit: number of shapes to record; others run without graphs.
        demanded: raise the error of a recording that fails, instead of going on without graphs.
    """

    def __init__(self, engine: GradientBuffers, limit: int, report: Report, demanded: bool) -> None:
        self.engine, self.limit, self.report, self.demanded = engine, limit, report, demanded
        self._graphs: dict[Any, list[_Graph]] = {}
        self._pool: Any = None

    def run(self, micro_batches: Sequence[TrainingBatch], body: Body) -> list[Tensor] | None:
        """Run the micro-batches of a step, which have one shape, and return the losses of each.

        None, with nothing done, where there is no graph for their shape.
        """
        shape = (len(micro_batches), *((name, *t.shape, t.dtype) for name, t in micro_batches[0].tensors().items()))
        if shape not in self._graphs and not self._add(shape, micro_batches[0], body):
            return None
        losses = []
        for number, batch in enumerate(micro_batches):
            graph = self._graphs[shape][min(number, 1)]
            torch._foreach_copy_(graph.inputs, list(batch.tensors().values()))
            graph.recording.replay()
            self.engine.filled.update(graph.filled)
            losses.append(graph.recording.losses.clone())
        return losses

    def _add(self, shape: Any, batch: TrainingBatch, body: Body) -> bool:
        if len(self._graphs) >= self.limit:
            if self.limit:
                self.report("CUDA graphs: no further shape is recorded (train.compile_shapes); others run without")
            self.limit = 0
            return False
        try:
            self._graphs[shape] = [self._record(batch, body, further) for further in range(min(shape[0], 2))]
        except RuntimeError as error:
            if self.demanded:
                raise
            self.limit = 0
            self.report(f"CUDA graphs: no, recording failed: {str(error).splitlines()[0]}")
            torch.cuda.empty_cache()
            return False
        finally:
            self.engine.discard_gradients()
        self.report(f"CUDA graphs: forward and backward of a micro-batch of {len(batch)} samples are replayed")
        return True

    def _record(self, batch: TrainingBatch, body: Body, further: int) -> _Graph:
        """Record the first (`further` is 0) or the further micro-batches of a step."""
        inputs = {name: tensor.clone() for name, tensor in batch.tensors().items()}
        fixed = TrainingBatch.from_tensors(batch.step, inputs)
        before = set(self.engine.filled) if further else set()  # left by the recording of the first

        def run() -> Tensor:
            self.engine.filled.clear()
            self.engine.filled.update(before)
            return body(fixed)

        if self._pool is None and torch.cuda.is_available():
            self._pool = torch.cuda.graph_pool_handle()
        recording = record(run, self._pool)
        return _Graph(list(inputs.values()), recording, frozenset(self.engine.filled))
