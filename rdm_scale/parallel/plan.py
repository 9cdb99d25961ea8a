"""Layout of a model on a number of ranks, and its memory and bubble: planned before anything is built."""

import itertools
import os
from dataclasses import dataclass

from rdm_scale import cost
from rdm_scale.config import RunConfig
from rdm_scale.dtypes import PRECISIONS
from rdm_scale.errors import ConfigError
from rdm_scale.parallel.pipeline.schedules import ChunkCost, ChunkPlacement, build_schedule, place_chunks, simulate

_GIB = 2**30
FILLED = 0.9  # share of a device's memory that the plan may fill: allocators and libraries need the rest
_COLUMNS = ("parameters", "gradients", "optimizer", "average", "activations", "working")


@dataclass(frozen=True)
class StageCost:
    """Memory of one rank of the pipeline; every rank of its tensor and data groups needs as much."""

    blocks: tuple[int, ...]  # in each of its chunks
    parameters: int
    state: cost.StateBytes
    activations: float  # bytes
    working: float  # bytes of temporary buffers: a block all-gathered, recomputed or reduced

    def bytes(self) -> dict[str, float]:
        """Bytes by column of the table."""
        state = self.state
        values = (state.parameters, state.gradients, state.optimizer, state.ema, self.activations, self.working)
        return dict(zip(_COLUMNS, values, strict=True))

    @property
    def total(self) -> float:
        return sum(self.bytes().values())


@dataclass(frozen=True)
class ParallelPlan:
    """Layout of a run on its ranks."""

    tensor: int
    pipeline: int
    data: int
    placement: ChunkPlacement
    blocks: tuple[range, ...]  # of each chunk
    micro_batch: int  # samples
    micro_batches: int  # a step, on each data-parallel rank
    keep_gathered: bool
    bubble: float  # predicted idle share of the pipeline's ranks
    stages: tuple[StageCost, ...]
    memory: float | None  # bytes a rank may use

    def table(self, config: RunConfig) -> str:
        """Table that rank 0 prints at the start, and `--dry-run`."""
        parallel, worst = config.parallel, max(stage.total for stage in self.stages)
        unit, size = ("GiB", 2**30) if worst >= 2**30 else ("MiB", 2**20)
        rows = [["stage", "blocks", *_COLUMNS, "in all"], ["", "", *[unit] * (len(_COLUMNS) + 1)]]
        for rank, stage in enumerate(self.stages):
            numbers = [*stage.bytes().values(), stage.total]
            rows.append([str(rank), "+".join(map(str, stage.blocks)), *(f"{number / size:,.2f}" for number in numbers)])
        zero = f"ZeRO stage {parallel.zero_stage}"
        if parallel.zero_stage == 3:
            zero += ", parameters kept gathered" if self.keep_gathered else ", parameters gathered by block"
        if parallel.shard_size is not None:
            zero += f", sharded over groups of {parallel.shard_size} of the data-parallel ranks"
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
        if parallel.offload != "none":
            host = max(stage.state.host for stage in self.stages)
            lines.append(f"in host memory at most {host / size:,.2f} {unit} a rank: optimizer, average, gradients")
        if self.memory is None:
            lines.append("set parallel.memory_gib to what a rank may use to see whether it fits")
        elif worst > self.memory:
            lines.append(
                f"warning: a rank needs {worst / size:,.1f} {unit} and has {self.memory / size:,.1f} {unit}: use more "
                "ranks, parallel.recompute=full, a smaller train.micro_batch_size or parallel.keep_gathered=never"
            )
        return "\n".join(lines)


def plan_parallelism(config: RunConfig, world_size: int, memory: float | None) -> ParallelPlan:
    """Plan the layout of a configuration on `world_size` ranks.

    Args:
        memory: bytes that a rank may use; None: not known.

    Raises:
        ConfigError: the layout does not fit the world or the batch; says which key to change.
    """
    data = config.data_parallel_size(world_size)
    parallel, train = config.parallel, config.train
    if data % (parallel.shard_size or 1):
        raise ConfigError(
            f"parallel.shard_size={parallel.shard_size} does not divide the number of data-parallel ranks, {data}"
        )
    share = train.global_batch_size // data
    micro_batch = train.micro_batch_size or share
    placement = place_chunks(parallel.schedule, parallel.pipeline, parallel.chunks_per_rank)
    blocks = balance(config, placement)
    schedule = build_schedule(parallel.schedule, placement, share // micro_batch)
    flops = [_chunk_flops(config, blocks, chunk) for chunk in range(placement.chunks)]
    backward = 3 if parallel.recompute == "full" else 2  # times the operations of a forward
    simulation = simulate(schedule, placement, lambda chunk: ChunkCost(flops[chunk], backward * flops[chunk]))

    def stage(rank: int, keep: bool) -> StageCost:
        chunks = placement.chunks_of(rank)
        parameters = sum(_chunk_parameters(config, blocks, chunk).on_rank(parallel.tensor) for chunk in chunks)
        kept = [cost.blocks_activation_bytes(config, micro_batch, blocks[chunk]) for chunk in chunks]
        return StageCost(
            blocks=tuple(len(blocks[chunk]) for chunk in chunks),
            parameters=parameters,
            state=cost.state_bytes(config, parameters, parallel.shard_size or data, keep),
            activations=simulation.in_flight[rank] * sum(kept) / len(kept),
            working=_working_bytes(config, micro_batch, parameters, keep),
        )

    def stages(keep: bool) -> tuple[StageCost, ...]:
        return tuple(stage(rank, keep) for rank in range(parallel.pipeline))

    keep = parallel.keep_gathered == "always" or parallel.offload != "none"
    if not keep and parallel.keep_gathered == "auto" and parallel.zero_stage == 3:
        keep = memory is None or max(s.total for s in stages(True)) <= FILLED * memory
    return ParallelPlan(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        data=data,
        placement=placement,
        blocks=blocks,
        micro_batch=micro_batch,
        micro_batches=share // micro_batch,
        keep_gathered=keep and parallel.zero_stage == 3,
        bubble=simulation.bubble,
        stages=stages(keep and parallel.zero_stage == 3),
        memory=memory,
    )


def memory_of_rank(config: RunConfig) -> float:
    """Bytes that a rank may use: `parallel.memory_gib`, else its GPU's, else its share of this node's memory."""
    if config.parallel.memory_gib is not None:
        return config.parallel.memory_gib * _GIB
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[1])
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def balance(config: RunConfig, placement: ChunkPlacement) -> tuple[range, ...]:
    """Assign blocks to chunks so that the costliest rank, and of its chunks the costliest one, costs least.

    Costs are floating-point operations, embeddings and head included. The two blocks that a long skip joins are put
    into chunks that are V-placement partners.
    """
    model, last = config.model, placement.last_chunk
    # The mean, because with factorized attention two kinds of blocks alternate.
    block = cost.blocks_flops(model, range(model.depth)) / model.depth
    sizes = [1] * placement.chunks
    chunks: list[float] = [block] * placement.chunks
    chunks[0] += cost.embedding_flops(model)
    chunks[last] += cost.head_flops(model)
    ranks = [sum(chunks[chunk] for chunk in placement.chunks_of(rank)) for rank in range(placement.ranks)]
    remaining = model.depth - placement.chunks
    while remaining:
        # Blocks cost the same, so assigning each to the cheapest chunk is optimal. Ties go to later chunks, which keep
        # fewer activations.
        least = min(range(placement.chunks), key=lambda chunk: (ranks[placement.rank_of(chunk)], chunks[chunk], -chunk))
        chosen = [least]
        # Blocks of a u stack are assigned in pairs; the middle block of an odd depth goes to the last rank.
        if model.stacking == "u" and placement.chunks > 1:
            chosen = [placement.chunks // 2] if remaining % 2 else [least, placement.partner_of(least)]
        for chunk in chosen:
            sizes[chunk] += 1
            chunks[chunk] += block
            ranks[placement.rank_of(chunk)] += block
        remaining -= len(chosen)
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
    parameters += cost.embedding_parameters(model) if chunk == 0 else cost.NO_PARAMETERS
    return parameters + (cost.head_parameters(model) if chunk == len(blocks) - 1 else cost.NO_PARAMETERS)


def _working_bytes(config: RunConfig, samples: int, parameters: int, keep: bool) -> float:
    largest = cost.block_parameters(config.model, config.model.depth - 1)  # has a long skip in a u stack
    block = largest.on_rank(config.parallel.tensor)
    working = 0.0
    if config.parallel.recompute != "none":
        working += cost.block_activation_bytes(config, samples, "none", config.model.depth - 1)
    if config.parallel.zero_stage == 3:
        # By block: two blocks all-gathered, and one block's gradients before and during their reduction. Kept
        # gathered: the gradients of one backward, before they are added to those of the step.
        compute = PRECISIONS[config.train.precision].bytes
        working += compute * parameters if keep else 2 * compute * block + 8 * block
    else:
        working += 4 * block
    return working


def _shortened(rows: list[list[str]]) -> list[list[str]]:
    """Rows of the first and the last stages, where there are many."""
    return rows if len(rows) <= 12 else [*rows[:6], ["..."] * len(rows[0]), *rows[-4:]]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
