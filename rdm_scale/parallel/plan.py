"""How a model would lie on so many ranks, and what that costs: planned before anything is built."""

import itertools
import os
from dataclasses import dataclass

from rdm_scale import cost
from rdm_scale.config import RunConfig
from rdm_scale.dtypes import PRECISIONS
from rdm_scale.parallel.pipeline.schedules import Placement, operations, placement, simulate

_GIB = 2**30
_FILLED = 0.9  # share of a device's memory that the plan may fill: allocators and libraries need the rest
_COLUMNS = ("parameters", "gradients", "optimizer", "average", "activations", "working")


@dataclass(frozen=True)
class StageCost:
    """What one rank of the pipeline holds (every rank of its tensor and data groups holds as much)."""

    blocks: tuple[int, ...]  # in each of its chunks
    parameters: int
    state: cost.StateBytes
    activations: float  # bytes
    working: float  # bytes of what exists for a moment only: a block gathered, recomputed or reduced

    def bytes(self) -> dict[str, float]:
        """By what they hold."""
        state = self.state
        values = (state.parameters, state.gradients, state.optimizer, state.average, self.activations, self.working)
        return dict(zip(_COLUMNS, values, strict=True))

    @property
    def total(self) -> float:
        return sum(self.bytes().values())


@dataclass(frozen=True)
class Layout:
    """A run's layout on its ranks."""

    tensor: int
    pipeline: int
    data: int
    placement: Placement
    blocks: tuple[range, ...]  # of each chunk
    micro_batch: int  # samples
    micro_batches: int  # a step, on each data-parallel rank
    keep_gathered: bool
    bubble: float  # predicted idle share of the pipeline's ranks
    stages: tuple[StageCost, ...]
    memory: float | None  # bytes a rank may use

    def table(self, config: RunConfig) -> str:
        """What rank 0 prints at the start, and --dry-run."""
        parallel, worst = config.parallel, max(stage.total for stage in self.stages)
        unit, size = ("GiB", 2**30) if worst >= 2**30 else ("MiB", 2**20)
        rows = [["stage", "blocks", *_COLUMNS, "in all"], ["", "", *[unit] * (len(_COLUMNS) + 1)]]
        for rank, stage in enumerate(self.stages):
            numbers = [*stage.bytes().values(), stage.total]
            rows.append([str(rank), "+".join(map(str, stage.blocks)), *(f"{number / size:,.2f}" for number in numbers)])
        zero = f"ZeRO stage {parallel.zero_stage}"
        if parallel.zero_stage == 3:
            zero += ", parameters kept gathered" if self.keep_gathered else ", parameters gathered by block"
        train, most = config.train, max(stage.parameters for stage in self.stages)
        lines = [
            f"layout: {self.tensor * self.pipeline * self.data} ranks = tensor {self.tensor} x pipeline "
            f"{self.pipeline} x data {self.data}; {zero}{'; sequence parallel' * parallel.sequence}",
            f"model: {cost.model_parameters(config.model).total / 1e6:,.1f} M parameters in {config.model.depth} "
            f"blocks, at most {most / 1e6:,.1f} M on a rank",
            f"step: {train.global_batch_size} samples = {self.data} x {self.micro_batches} micro-batches of "
            f"{self.micro_batch}; schedule {parallel.schedule}, predicted bubble {self.bubble:.1%}; "
            f"recompute {parallel.recompute}",
            "bytes on a rank of each stage:",
            *_aligned(_shortened(rows)),
        ]
        if self.memory is None:
            lines.append("set parallel.memory_gib to what a rank may use to see whether it fits")
        elif worst > self.memory:
            lines.append(
                f"warning: a rank needs {worst / size:,.1f} {unit} and has {self.memory / size:,.1f} {unit}: use more "
                "ranks, parallel.recompute=full, a smaller train.micro_batch_size or parallel.keep_gathered=never"
            )
        return "\n".join(lines)


def plan(config: RunConfig, world_size: int, memory: float | None) -> Layout:
    """The layout of a configuration on so many ranks, each of which may use `memory` bytes (None: not known).

    Raises:
        ConfigError: the layout does not fit the world or the batch; says which key to change.
    """
    data = config.data_parallel_size(world_size)
    parallel, train = config.parallel, config.train
    share = train.global_batch_size // data
    micro_batch = train.micro_batch_size or share
    place = placement(parallel.schedule, parallel.pipeline, parallel.chunks_per_rank)
    blocks = balance(config, place)
    orders = operations(parallel.schedule, place, share // micro_batch)
    flops = [_chunk_flops(config, blocks, chunk) for chunk in range(place.chunks)]
    backward = 3 if parallel.recompute == "full" else 2  # forwards' worth
    simulation = simulate(orders, place, lambda chunk: (flops[chunk], backward * flops[chunk]))

    def stage(rank: int, keep: bool) -> StageCost:
        chunks = place.chunks_of(rank)
        parameters = sum(_chunk_parameters(config, blocks, chunk).on_rank(parallel.tensor) for chunk in chunks)
        kept = [cost.blocks_activation_bytes(config, micro_batch, blocks[chunk]) for chunk in chunks]
        return StageCost(
            blocks=tuple(len(blocks[chunk]) for chunk in chunks),
            parameters=parameters,
            state=cost.state_bytes(config, parameters, data, keep),
            activations=simulation.in_flight[rank] * sum(kept) / len(kept),
            working=_working_bytes(config, micro_batch, parameters, data, keep),
        )

    def stages(keep: bool) -> tuple[StageCost, ...]:
        return tuple(stage(rank, keep) for rank in range(parallel.pipeline))

    keep = parallel.keep_gathered == "always"
    if parallel.keep_gathered == "auto" and parallel.zero_stage == 3:
        keep = memory is None or max(s.total for s in stages(True)) <= _FILLED * memory
    return Layout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        data=data,
        placement=place,
        blocks=blocks,
        micro_batch=micro_batch,
        micro_batches=share // micro_batch,
        keep_gathered=keep and parallel.zero_stage == 3,
        bubble=simulation.bubble,
        stages=stages(keep and parallel.zero_stage == 3),
        memory=memory,
    )


def memory_of_rank(config: RunConfig) -> float | None:
    """Bytes that a rank may use: as configured, else of its GPU, else its share of this node's memory."""
    if config.parallel.memory_gib is not None:
        return config.parallel.memory_gib * _GIB
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[1])
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def balance(config: RunConfig, place: Placement) -> tuple[range, ...]:
    """The blocks of each chunk, such that the costliest rank has as little to do as can be, and of its chunks the
    costliest; embeddings and head count. Of a u stack, blocks that mirror each other are in chunks that do."""
    model, last = config.model, place.chunks - 1
    block = cost.blocks_flops(model, range(model.depth)) / model.depth  # they are alike, or take turns
    sizes = [1] * place.chunks
    chunks: list[float] = [block] * place.chunks
    chunks[0] += cost.embedding_flops(model)
    chunks[last] += cost.head_flops(model)
    ranks = [sum(chunks[chunk] for chunk in place.chunks_of(rank)) for rank in range(place.ranks)]
    left = model.depth - place.chunks
    while left:
        # Of equal blocks, giving each to who has least is optimal: to late chunks first, of which less is kept.
        least = min(range(place.chunks), key=lambda chunk: (ranks[place.rank_of(chunk)], chunks[chunk], -chunk))
        takers = [least]
        if model.stacking == "u" and place.chunks > 1:  # by twos; the middle one, if there is one, to the last rank
            takers = [place.chunks // 2] if left % 2 else [least, place.mirror_of(least)]
        for chunk in takers:
            sizes[chunk] += 1
            chunks[chunk] += block
            ranks[place.rank_of(chunk)] += block
        left -= len(takers)
    ends = list(itertools.accumulate(sizes))
    return tuple(range(end - size, end) for end, size in zip(ends, sizes, strict=True))


def _chunk_flops(config: RunConfig, blocks: tuple[range, ...], chunk: int) -> float:
    model = config.model
    flops: float = cost.blocks_flops(model, blocks[chunk])
    flops += cost.embedding_flops(model) if chunk == 0 else 0
    return flops + (cost.head_flops(model) if chunk == len(blocks) - 1 else 0)


def _chunk_parameters(config: RunConfig, blocks: tuple[range, ...], chunk: int) -> cost.Parameters:
    model = config.model
    parameters = cost.blocks_parameters(model, blocks[chunk])
    parameters += cost.embedding_parameters(model) if chunk == 0 else cost.NOTHING
    return parameters + (cost.head_parameters(model) if chunk == len(blocks) - 1 else cost.NOTHING)


def _working_bytes(config: RunConfig, samples: int, parameters: int, data: int, keep: bool) -> float:
    largest = cost.block_parameters(config.model, config.model.depth - 1)  # the one with a long skip, if any has
    block = largest.on_rank(config.parallel.tensor)
    working = 0.0
    if config.parallel.recompute != "none":
        working += cost.block_activation_bytes(config, samples, "none", config.model.depth - 1)
    if config.parallel.zero_stage == 3:
        # By block: two blocks gathered, one's gradients before and during their reduction. At once: all gradients
        # during their reduction, where there is one.
        compute = PRECISIONS[config.train.precision].bytes
        at_once = 4 * parameters if data > 1 else 0
        working += at_once if keep else 2 * compute * block + 8 * block
    else:
        working += 4 * block
    return working


def _shortened(rows: list[list[str]]) -> list[list[str]]:
    """Of many stages the first and the last."""
    return rows if len(rows) <= 12 else [*rows[:6], ["..."] * len(rows[0]), *rows[-4:]]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
