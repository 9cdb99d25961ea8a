"""Small data sets of latents, as the fixture `write_set` makes them, and a record of the ranges that are read."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rdm_scale.batch import LatentBatch
from rdm_scale.codecs.record import CodecRecord
from rdm_scale.config import DataSource
from rdm_scale.data.contiguous_reader import ContiguousReader
from rdm_scale.data.dataset import open_dataset
from rdm_scale.data.manifest import Manifest
from rdm_scale.data.order import ContiguousRead
from rdm_scale.storage.location import Location

IDENTITY = CodecRecord(name="identity", location="identity")
BATCH_TENSORS = ("positions", "ids", "labels", "latents")


@dataclass
class LatentSet:
    """A written data set, and the samples that went into it."""

    folder: Location
    manifest: Manifest
    latents: Tensor
    ids: Tensor
    labels: Tensor

    @property
    def url(self) -> str:
        return str(self.folder)


WriteSet = Callable[..., LatentSet]


class RangeRead(NamedTuple):
    """One range request: the file, the offset of the range and its size."""

    file: str
    offset: int
    bytes: int


def record_reads(monkeypatch: pytest.MonkeyPatch) -> list[RangeRead]:
    """Record the range requests from now on."""
    reads: list[RangeRead] = []
    read_into = Location.read_into

    def recording(location: Location, offset: int, buffer: memoryview) -> int:
        reads.append(RangeRead(str(location), offset, len(buffer)))
        return read_into(location, offset, buffer)

    monkeypatch.setattr(Location, "read_into", recording)
    return reads


def assert_batches_equal(one: LatentBatch, other: LatentBatch) -> None:
    assert one.step == other.step
    for name in BATCH_TENSORS:
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def concatenate_batches(parts: list[LatentBatch]) -> LatentBatch:
    """One batch of the samples of several, with the step of the first."""
    tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in BATCH_TENSORS}
    return LatentBatch(parts[0].step, **tensors)


def open_reader(latents: LatentSet, in_use: int = 1, workers: int = 1, largest: int = 1) -> ContiguousReader:
    """A reader of one data set, without a disk cache."""
    dataset = open_dataset(DataSource(path=latents.url))
    return ContiguousReader([dataset], in_use=in_use, largest=largest, workers=workers, cache=None)


def reads_of_members(latents: LatentSet) -> list[ContiguousRead]:
    """One contiguous read per member, in order."""
    shards = latents.manifest.shards
    return [ContiguousRead(0, s, m, m + 1) for s, shard in enumerate(shards) for m in range(len(shard.members))]


def write_buckets(write_set: WriteSet, *shapes: tuple[int, int, int, int]) -> str:
    """The folder of one data set with a shard of 12 samples of each shape."""
    parts = [write_set(12, shape=shape, members_per_shard=3) for shape in shapes]
    tree = json.loads((parts[0].folder / "manifest.json").read())
    for number, part in enumerate(parts[1:], 1):
        shard = json.loads(part.manifest.shards[0].model_dump_json(exclude_none=True))
        name = f"shard-{number:06d}.tar"
        (parts[0].folder / name).write((part.folder / shard["name"]).read())
        tree["shards"].append(shard | {"name": name, "shape": list(shapes[number])})
        tree["samples"] += shard["samples"]
    (parts[0].folder / "manifest.json").write(json.dumps(tree).encode())
    return parts[0].url
