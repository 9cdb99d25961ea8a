"""Run planner: all layouts of a configuration on a number of GPUs, ranked by predicted step time.

Layouts are combinations of tensor, sequence and pipeline parallelism, schedule, ZeRO stage, gathering, recomputation,
micro-batch and CUDA graphs. The checks of the configuration say which are valid, `plan_parallelism` which fit into
memory and how large the bubble is. An estimate takes far less time than a plan and is nearly a lower bound of its step,
so layouts are planned in the order of their estimates, until no further one can be among the best.
"""

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from rdm_scale import cost
from rdm_scale.config import RunConfig
from rdm_scale.errors import ConfigError
from rdm_scale.parallel.pipeline.schedules import build_schedule, place_chunks, simulate
from rdm_scale.parallel.plan import FILLED, ParallelPlan, plan_parallelism
from rdm_scale.scaling.device_rates import DeviceRates
from rdm_scale.scaling.predicted_step import LayoutKeys, ModelTotals, ModelWork, StepSeconds, step_seconds

_GIB = 2**30
SCHEDULES = (("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_1f1b", 4), ("v_1f1b", 2))  # with chunks a rank
RECOMPUTE = ("none", "selective", "every_2", "full")
# ZeRO stage, keep_gathered, overlap and CUDA graphs; graphs cannot be recorded around collectives of the backward.
STATES = (
    (3, "always", True, False),
    (3, "always", False, True),
    (3, "never", True, False),
    (2, "auto", True, False),
    (1, "auto", True, False),
    (0, "auto", True, False),
)


@dataclass(frozen=True)
class RankedLayout:
    """A layout that fits, with its predicted step."""

    keys: LayoutKeys
    config: RunConfig
    plan: ParallelPlan
    step: StepSeconds

    @property
    def memory_gib(self) -> float:
        return max(stage.total for stage in self.plan.stages) / _GIB


def search_layouts(config: RunConfig, gpus: int, rates: DeviceRates, count: int = 10) -> list[RankedLayout]:
    """The best layouts, fastest first.

    Raises:
        ConfigError: no layout is valid and fits, or the planner has no rates for the configuration.
    """
    if config.train.precision != "bf16":
        raise ConfigError(f"rates are known for bf16, not for train.precision={config.train.precision}: add "
                          "train.precision=bf16")  # fmt: skip
    if config.parallel.offload != "none" or config.parallel.shard_size is not None:
        raise ConfigError("the planner has no rates for parallel.offload and parallel.shard_size: leave them out")
    waiting = [_Estimate(seconds, number, keys, work) for number, (seconds, keys, work) in
               enumerate(_estimates(config, gpus, rates))]  # fmt: skip
    heapq.heapify(waiting)
    best: list[RankedLayout] = []
    while waiting and not (len(best) == count and waiting[0].seconds >= best[-1].step.total):
        estimate = heapq.heappop(waiting)
        keys, work = estimate.keys, estimate.work
        if not estimate.simulated and keys.pipeline > 1:
            micro_batches = config.train.global_batch_size * keys.tensor * keys.pipeline // gpus // keys.micro_batch
            bubble = even_bubble(keys.schedule, keys.pipeline, keys.chunks, micro_batches)
            seconds = step_seconds(work, keys, gpus, work.parameters // keys.pipeline, bubble).total
            heapq.heappush(waiting, estimate._replace(seconds=seconds, simulated=True))
            continue
        found = _planned(config, keys, work, gpus)
        if found is not None:
            best = sorted([*best, found], key=lambda each: each.step.total)[:count]
    if not best:
        raise ConfigError(
            f"no layout of {gpus} GPUs with {rates.memory_gib:g} GiB is valid and fits: use more GPUs, or another "
            f"train.global_batch_size than {config.train.global_batch_size}, which the data-parallel ranks must divide"
        )
    return best


class _Estimate(NamedTuple):
    seconds: float
    number: int  # earlier layouts first, where two take equally long
    keys: LayoutKeys
    work: ModelWork
    simulated: bool = False  # the schedule, with blocks that divide evenly


@cache
def even_bubble(schedule: str, ranks: int, chunks: int, micro_batches: int) -> float:
    """Bubble of a schedule whose chunks cost the same."""
    placement = place_chunks(schedule, ranks, chunks)
    return simulate(build_schedule(schedule, placement, micro_batches), placement).bubble


def _planned(config: RunConfig, keys: LayoutKeys, work: ModelWork, gpus: int) -> RankedLayout | None:
    """A layout with its plan; None where it does not fit."""
    memory = keys.memory_gib * _GIB
    laid_out = keys.applied(config)
    plan = plan_parallelism(laid_out, gpus, memory)
    # A graph has activations of its own beside those of steps that are not replayed.
    needed = max(stage.total + stage.activations * keys.cuda_graphs for stage in plan.stages)
    if needed > FILLED * memory:
        return None
    parameters = max(stage.parameters for stage in plan.stages)
    return RankedLayout(keys, laid_out, plan, step_seconds(work, keys, gpus, parameters, plan.bubble))


def _estimates(config: RunConfig, gpus: int, rates: DeviceRates) -> Iterator[tuple[float, LayoutKeys, ModelWork]]:
    """Valid layouts, with estimates of their steps, of which a lower bound of the memory fits."""
    totals = ModelTotals.of(config.model)
    for shape, recompute in itertools.product(_shapes(config, gpus, rates), RECOMPUTE):
        base = LayoutKeys(**{**vars(shape), "recompute": recompute})
        laid_out = base.applied(config)
        work = ModelWork(laid_out, base, rates, totals)
        share = config.train.global_batch_size // (gpus // (base.tensor * base.pipeline))
        for micro_batch in (size for size in range(1, share + 1) if share % size == 0):
            micro_batches = share // micro_batch
            if base.schedule == "interleaved_1f1b" and micro_batches % base.pipeline:
                continue  # data_parallel_size refuses it
            # The last rank waits for its first forward and has ended its last backward when the first rank goes on; and
            # no step is shorter than one micro-batch through all stages. In units of a rank's work for a micro-batch.
            shortest = max(micro_batches + (base.pipeline - 1) / base.chunks, base.pipeline)
            ideal = 1 - micro_batches / shortest
            for state in STATES:
                keys = _with_state(base, state, micro_batch)
                if keys is None or not _may_fit(work, keys, gpus, micro_batches):
                    continue
                parameters = work.parameters // base.pipeline
                yield step_seconds(work, keys, gpus, parameters, ideal).total, keys, work


def _with_state(base: LayoutKeys, state: tuple[int, str, bool, bool], micro_batch: int) -> LayoutKeys | None:
    zero_stage, keep_gathered, overlap, graphs = state
    if graphs and base.tensor * base.pipeline > 1:
        return None
    changed = {"zero_stage": zero_stage, "keep_gathered": keep_gathered, "overlap": overlap, "cuda_graphs": graphs}
    return LayoutKeys(**{**vars(base), **changed, "micro_batch": micro_batch})


def _may_fit(work: ModelWork, keys: LayoutKeys, gpus: int, micro_batches: int) -> bool:
    """False if not even the mean rank of the pipeline fits; cheaper than a plan."""
    data = gpus // (keys.tensor * keys.pipeline)
    parallel = work.config.parallel.model_copy(update={"zero_stage": keys.zero_stage})
    config = work.config.model_copy(update={"parallel": parallel})
    state = cost.state_bytes(config, work.parameters // keys.pipeline, data, keys.keep_gathered == "always")
    # The first rank starts `pipeline` micro-batches before its first backward; half of that with V placement.
    in_flight = min(keys.pipeline, micro_batches) / (2 if keys.schedule == "v_1f1b" else 1)
    activations = in_flight * keys.micro_batch * work.sample_activations / keys.pipeline
    return state.total + activations * (1 + keys.cuda_graphs) <= FILLED * keys.memory_gib * _GIB


def _shapes(config: RunConfig, gpus: int, rates: DeviceRates) -> Iterator[LayoutKeys]:
    """Tensor x sequence x pipeline x schedule that the configuration's checks accept; tensor groups stay in a node."""
    sizes = [size for size in range(1, gpus + 1) if gpus % size == 0]
    for tensor, pipeline in itertools.product(sizes, sizes):
        if tensor > rates.node_gpus or gpus % (tensor * pipeline) or pipeline > config.model.depth:
            continue
        if config.train.global_batch_size % (gpus // (tensor * pipeline)):
            continue
        for sequence, (schedule, chunks) in itertools.product((False, True), SCHEDULES):
            keys = LayoutKeys(
                tensor=tensor,
                sequence=sequence,
                pipeline=pipeline,
                schedule=schedule,
                chunks=chunks,
                zero_stage=3,
                keep_gathered="always",
                overlap=True,
                recompute="none",
                micro_batch=1,
                cuda_graphs=False,
                memory_gib=rates.memory_gib,
            )
            try:
                keys.applied(config)
            except ConfigError:
                continue
            yield keys
