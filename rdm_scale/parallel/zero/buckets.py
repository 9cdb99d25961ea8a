"""Buckets of a stage's parameters, whose collectives overlap with the computation of other buckets."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from rdm_scale.parallel.stage import Stage

# Elements of a bucket: large enough for a network's full rate, and few enough that the first is soon there. Of small
# models an eighth.
_LARGEST = 2**25
_AT_LEAST = 8


@dataclass
class ParameterBucket:
    """State of a bucket in a step.

    Attributes:
        flats: numbers of its flat parameters.
        parameters: numbers of its parameters, in the order of the flat parameters.
        gathered: its parameters are, or are being, all-gathered since they were published last.
        reduced: the reduction of its gradients has been started in this step.
        wait: waits for its last collective.
    """

    flats: list[int]
    parameters: list[int]
    gathered: bool = True
    reduced: bool = False
    wait: Callable[[], None] = lambda: None


def assign_buckets(stage: Stage) -> tuple[dict[str, int], dict[int, nn.Module]]:
    """Assign a stage's parameters to buckets.

    Bucket 0 has what lies outside of the blocks, which can be nothing. It is used first and last, and by all chunks.
    Each other bucket has consecutive blocks of one chunk.

    Returns:
        Bucket of each parameter by name, and the first block of each bucket but bucket 0.
    """
    bucket_of = {name: 0 for name, _ in stage.named_parameters()}
    largest = min(_LARGEST, sum(parameter.numel() for parameter in stage.parameters()) // _AT_LEAST)
    first_blocks: dict[int, nn.Module] = {}
    bucket = 0
    for part in stage.parts.values():
        size = largest + 1  # each chunk begins a bucket
        for number in part.blocks:
            block = stage.blocks[str(number)]
            of_block = sum(parameter.numel() for parameter in block.parameters())
            if size + of_block > largest:
                bucket, size = bucket + 1, 0
                first_blocks[bucket] = block
            size += of_block
            bucket_of |= {f"blocks.{number}.{name}": bucket for name, _ in block.named_parameters()}
    return bucket_of, first_blocks
