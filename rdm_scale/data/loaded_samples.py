"""Samples in memory: the bytes of a contiguous read, with the offsets, ids and labels of its samples."""

import json
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rdm_scale.conditions import EncodedText
from rdm_scale.data.buffer_pool import as_memoryview
from rdm_scale.data.shard_writer import pack_samples


class LoadedSamples(NamedTuple):
    """The samples of a contiguous read, indexed for cheap lookups.

    Arrays are used because lists would take a pointer and an object per number.

    Attributes:
        content: the bytes that were read.
        starts: offset of the raw latents of each sample in `content`.
        sample_bytes: size of the raw latents of one sample.
        captions: one per sample, or empty if captions are not read.
    """

    content: memoryview
    starts: "array[int]"
    sample_bytes: int
    ids: "array[int]"
    labels: "array[int]"
    captions: list[EncodedText]

    def take(self, order: Sequence[int]) -> "LoadedSamples":
        """Select samples by index, modulo their number, in the given order; the latents are not copied."""
        indices = [index % len(self.ids) for index in order]
        return self._replace(
            starts=array("q", [self.starts[i] for i in indices]),
            ids=array("q", [self.ids[i] for i in indices]),
            labels=array("q", [self.labels[i] for i in indices]),
            captions=[self.captions[i] for i in indices] if self.captions else [],
        )


class LoadedSample(NamedTuple):
    """One sample: the read that contains it, and its index there."""

    samples: LoadedSamples
    sample: int


class MemberContent(NamedTuple):
    """Offset of the latents in the bytes of a member, and the ids and labels of its samples."""

    start: int
    ids: list[int]
    labels: list[int]


def parse_in_place(
    content: memoryview, samples: int, shape: tuple[int, ...], dtype: torch.dtype
) -> MemberContent | None:
    """Parse a member without copying its latents, which would cost as much as reading them.

    Returns:
        The parsed member; None if its size or header is not what `pack_samples` writes for this number of samples.
    """
    layout = _layout(samples, shape, dtype)
    if len(content) != layout.size or content[: len(layout.header)] != layout.header:
        return None
    ids, labels = (np.frombuffer(content, "<i8", samples, layout.starts[name]).tolist() for name in ("ids", "labels"))
    return MemberContent(layout.starts["latents"], ids, labels)


def rewrite_in_place(content: memoryview, tensors: dict[str, Tensor]) -> MemberContent:
    """Move the latents of a member with another safetensors layout to the beginning of its bytes."""
    latents = as_memoryview(tensors["latents"].flatten().view(torch.uint8))
    content[: len(latents)] = latents
    return MemberContent(0, tensors["ids"].tolist(), tensors["labels"].tolist())


class _Layout(NamedTuple):
    """Header of a member, its size, and the offset of each of its tensors."""

    header: bytes
    size: int
    starts: dict[str, int]


@lru_cache(maxsize=256)
def _layout(samples: int, shape: tuple[int, ...], dtype: torch.dtype) -> _Layout:
    integers = torch.zeros(samples, dtype=torch.int64)
    content = pack_samples(torch.zeros(samples, *shape, dtype=dtype), integers, integers)
    end = 8 + int.from_bytes(content[:8], "little")
    starts = {name: end + entry["data_offsets"][0] for name, entry in json.loads(content[8:end]).items()}
    return _Layout(content[:end], len(content), starts)
