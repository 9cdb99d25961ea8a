"""Predicted duration of a training step under a layout, from the measured rates of a device.

Four parts, which docs/scaling.md explains: computation (FLOPs over the device's rate, or Python's time to issue them
where that is longer), update (clipping, AdamW and EMA of the parameters that a rank updates), bubble (the pipeline's
share of computation and tensor-parallel communication), and communication that no computation hides.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rdm_scale import cost
from rdm_scale.config import ModelConfig, RunConfig, parse_config
from rdm_scale.dtypes import PRECISIONS
from rdm_scale.scaling.device_rates import DeviceRates, Network

# Bytes of memory that a micro-batch reads and writes for each parameter, in bf16. False: the gradient is added to that
# of the step (2 + 4 + 4). True: by block, the parameter is gathered twice (2 x 2) and the gradient converted (2 + 4),
# reduced (4 + 4) and added (2: the shard's part is small).
PASSES = {False: 10, True: 20}
BUCKET, LEAST_BUCKETS = (
    2**25,
    8,
)  # parameters of a bucket at most, and buckets at least, as zero/buckets.py divides them


@dataclass(frozen=True)
class LayoutKeys:
    """The keys of one layout, in the order in which they are printed."""

    tensor: int
    sequence: bool
    pipeline: int
    schedule: str
    chunks: int
    zero_stage: int
    keep_gathered: str
    overlap: bool
    recompute: str
    micro_batch: int
    cuda_graphs: bool
    memory_gib: float

    def values(self) -> dict[str, dict[str, Any]]:
        """Values by section and key."""
        parallel = {name: value for name, value in vars(self).items() if name not in ("micro_batch", "cuda_graphs")}
        train = {"micro_batch_size": self.micro_batch, "compile": "true"}
        return {"parallel": parallel, "train": train | {"cuda_graphs": str(self.cuda_graphs).lower()}}

    def overrides(self) -> list[str]:
        """`key=value` of all keys."""
        return [
            f"{section}.{key}={str(value).lower() if isinstance(value, bool) else value}"
            for section, values in self.values().items()
            for key, value in values.items()
        ]

    def applied(self, config: RunConfig) -> RunConfig:
        """The configuration with this layout.

        Raises:
            ConfigError: the configuration's own checks refuse it.
        """
        tree = config.model_dump(mode="json")
        for section, values in self.values().items():
            tree[section] |= values
        return parse_config(tree, "of a layout")


@dataclass(frozen=True)
class StepSeconds:
    """Predicted duration of a step, by its parts."""

    computation: float
    update: float
    bubble: float
    communication: float

    @property
    def total(self) -> float:
        return self.computation + self.update + self.bubble + self.communication


@dataclass(frozen=True)
class ModelTotals:
    """Counts of a full model, which every layout shares.

    Attributes:
        flops: of the forward and backward on one sample.
        branches: residual branches of all blocks.
    """

    flops: int
    parameters: cost.Parameters
    embedding: cost.Parameters
    head: cost.Parameters
    branches: int

    @classmethod
    def of(cls, model: ModelConfig) -> "ModelTotals":
        skips = sum(model.skip_source(block) is not None for block in range(model.depth))
        return cls(
            flops=3 * cost.model_flops(model),
            parameters=cost.model_parameters(model),
            embedding=cost.embedding_parameters(model),
            head=cost.head_parameters(model),
            branches=model.depth * (2 + (model.condition == "text")) + skips,
        )


class ModelWork:
    """Work of the full model under one tensor, sequence and recompute choice; times are those of one pipeline rank."""

    def __init__(self, config: RunConfig, keys: LayoutKeys, rates: DeviceRates, totals: ModelTotals) -> None:
        self.config, self.keys, self.rates = config, keys, rates
        model, tensor = config.model, keys.tensor
        divided = 1 - rates.elementwise_share * (not keys.sequence)
        self.tensor_share = divided / tensor + 1 - divided  # of the time of a block that is not tensor-parallel
        self.flops, self.branches = totals.flops, totals.branches
        self.parameters = totals.parameters.on_rank(tensor)
        parts = (totals.embedding.on_rank(tensor), totals.head.on_rank(tensor))
        self.outside = sum(parts) if keys.pipeline == 1 else max(parts)  # of the rank with the larger one
        self.token_bytes = model.tokens * model.hidden_size * PRECISIONS[config.train.precision].bytes
        self.residual_bytes = model.tokens * model.hidden_size * PRECISIONS[config.train.residual_dtype].bytes

    @cached_property
    def sample_activations(self) -> float:
        """Bytes that one sample saves in all blocks."""
        return cost.blocks_activation_bytes(self.config, 1, range(self.config.model.depth))

    def computation(self, keys: LayoutKeys) -> float:
        """Forward and backward of a micro-batch, on a mean rank of the pipeline."""
        depth, rates, by_block = self.config.model.depth, self.rates, keys.keep_gathered == "never"
        device = keys.micro_batch * self.flops * self.tensor_share / rates.flops_per_s(keys.recompute)
        device += depth * rates.block_s
        device += self.parameters * PASSES[by_block] / (1e9 * rates.memory_gb_per_s)
        host = 0.0 if keys.cuda_graphs else depth * (rates.host_by_block_s if by_block else rates.host_block_s)
        return max(device, host) / keys.pipeline

    def tensor_communication(self, micro_batch: int) -> float:
        """Collectives of tensor parallelism for a micro-batch, on a mean rank of the pipeline.

        A branch all-gathers and reduce-scatters its tokens (an all-reduce takes as long as both) in the forward and in
        the backward; sequence parallelism gathers once more in the backward, and recomputing repeats the forward.
        """
        recompute, rates = self.keys.recompute, self.rates
        again = {"none": 0.0, "selective": 0.0, "full": 1.0}.get(recompute)
        again = 1 / int(recompute.removeprefix("every_")) if again is None else again
        calls = 4 + self.keys.sequence + 2 * again
        network = rates.network(self.keys.tensor, 1)
        return self.branches * calls * network.seconds(micro_batch * self.token_bytes) / self.keys.pipeline

    def messages(self, micro_batch: int, micro_batches: int, network: Network) -> float:
        """Messages of a step between stages: for each chunk and micro-batch one forward and one backward."""
        keys = self.keys
        if keys.pipeline == 1:
            return 0.0
        size = micro_batch * self.residual_bytes / (keys.tensor if keys.sequence else 1)
        return micro_batches * keys.chunks * 2 * (network.latency_s + size / network.bytes_per_s)


def beside(count: int, communication: float, computation: float) -> float:
    """Exposed time of `count` equal collectives, each beside one of as many equal parts of a computation.

    The first part waits for the first collective; the others run beside the part before: t + (n - 1) max(0, t - c).
    """
    return communication + (count - 1) * max(0.0, communication - computation)


def data_communication(
    keys: LayoutKeys,
    config: RunConfig,
    *,
    parameters: int,
    outside: int,
    blocks: int,
    forward: float,
    backward: float,
    micro_batches: int,
    network: Network,
) -> float:
    """Exposed communication of a step on the data axis.

    With gathered parameters and overlap this is the replay of benchmarks/overlap.py for equal blocks.

    Args:
        parameters: of the rank, with `outside` of them in no block.
        blocks: of the rank.
        forward: duration of a micro-batch's forward on the rank; `backward` likewise.
    """
    if network.ranks == 1:
        return 0.0
    size, gradient = PRECISIONS[config.train.precision].bytes, PRECISIONS[config.parallel.reduce_dtype].bytes
    inside = max(0, parameters - outside)
    gather, reduce = network.seconds(size * parameters), network.seconds(gradient * parameters)
    if keys.zero_stage == 0:
        return 2 * reduce
    if keys.zero_stage == 1:
        return gather + reduce
    buckets = max(1, min(blocks, math.ceil(inside / min(BUCKET, max(1, parameters // LEAST_BUCKETS)))))
    reduced = network.seconds(gradient * inside / buckets)
    last = network.seconds(gradient * outside) + beside(buckets, reduced, backward / buckets)
    if keys.zero_stage == 2:
        return gather + micro_batches * last
    if keys.keep_gathered == "never":
        one = network.seconds(size * inside / blocks)
        both = one + network.seconds(gradient * inside / blocks)
        exposed = beside(blocks, one, forward / blocks) + beside(blocks, both, backward / blocks)
        return micro_batches * (exposed + 2 * network.seconds(size * outside) + network.seconds(gradient * outside))
    if not keys.overlap:
        return gather + reduce
    gathered = network.seconds(size * inside / buckets)
    return network.seconds(size * outside) + beside(buckets, gathered, forward / buckets) + last


def step_seconds(work: ModelWork, keys: LayoutKeys, gpus: int, parameters: int, bubble: float) -> StepSeconds:
    """Predicted step of a layout whose costliest rank has so many parameters, with a bubble of this share."""
    config, rates = work.config, work.rates
    data = gpus // (keys.tensor * keys.pipeline)
    micro_batches = config.train.global_batch_size // data // keys.micro_batch
    computed = work.computation(keys)
    tensor = work.tensor_communication(keys.micro_batch)
    backward_share = 3 / 4 if keys.recompute == "full" else 2 / 3
    busy = computed + tensor
    exposed = data_communication(
        keys,
        config,
        parameters=parameters,
        outside=work.outside,
        blocks=math.ceil(config.model.depth / keys.pipeline),
        forward=busy * (1 - backward_share),
        backward=busy * backward_share,
        micro_batches=micro_batches,
        network=rates.network(data, keys.tensor),
    )
    between = rates.network(2, gpus // keys.pipeline)  # neighbors in the pipeline, the outermost axis
    return StepSeconds(
        computation=micro_batches * computed,
        update=rates.update_s * parameters / (data if keys.zero_stage else 1),
        bubble=micro_batches * busy * bubble / (1 - bubble),
        communication=micro_batches * tensor + exposed + work.messages(keys.micro_batch, micro_batches, between),
    )
