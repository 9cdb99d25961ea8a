"""Members of shards, read by threads ahead of their use and kept while they are in use."""

import json
import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple, cast

import numpy as np
import torch
import xxhash
from torch import Tensor

from rdm_scale.config import DataConfig, DataSource
from rdm_scale.data.cache import MemberCache
from rdm_scale.data.manifest import Manifest, Tar, read_manifest
from rdm_scale.data.shards import DTYPES, pack_samples, read_bytes, unpack_samples
from rdm_scale.data.storage import Location, Stat
from rdm_scale.errors import DataError

_MEMORY_BYTES = 2**28  # of members kept, at least


class OpenSet(NamedTuple):
    """A set of shards whose manifest has been read and whose files have been looked at."""

    manifest: Manifest
    folder: Location
    found: dict[str, Stat]  # the files, as they were when the set was opened
    damaged: dict[int, DataError]  # shards that are missing or have another size than the manifest says
    weight: float


class Samples(NamedTuple):
    """A member, taken apart so that one of its samples costs little to look up."""

    latents: memoryview  # bytes of the raw latents, one sample after another
    size: int  # of a sample, in bytes
    ids: list[int]
    labels: list[int]


MemberKey = tuple[int, int, int]  # set, shard, member; plain, for one is made for every sample


class UnreadableError(DataError):
    """A member of a set cannot be read."""

    def __init__(self, key: MemberKey, reason: DataError) -> None:
        super().__init__(str(reason))
        self.set, self.shard = key[:2]
        self.reason = reason


def open_set(source: DataSource, options: dict[str, object] | None = None) -> OpenSet:
    """A set, all of whose files have been looked at in one listing. Raises DataError: its manifest's fault."""
    manifest, folder = read_manifest(source.path, options)
    try:
        found = folder.stats()
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error}") from None
    damaged: dict[int, DataError] = {}
    for index, shard in enumerate(manifest.shards):
        for tar in (shard, shard.text):
            if tar is not None and (wrong := _wrong_size(folder / tar.name, tar, found.get(tar.name))):
                damaged.setdefault(index, DataError(f"{wrong}: copy or encode the data again"))
    return OpenSet(manifest, folder, found, damaged, source.weight)


def _wrong_size(place: Location, tar: Tar, found: Stat | None) -> str | None:
    if found is None:
        return f"{place} is missing, and the manifest lists it"
    if found.bytes != tar.bytes:
        return f"{place} has {found.bytes} bytes, the manifest says {tar.bytes}"
    return None


class MemberReader:
    """Reads members of several sets.

    Those used last are kept: `streams` of them and as many again that were asked for ahead, whatever their size. A
    member whose read has failed is read again when it is asked for again.

    Args:
        streams: how many members are in use at a time.
    """

    def __init__(self, sets: Sequence[OpenSet], *, streams: int, workers: int, cache: MemberCache | None) -> None:
        self.sets, self.workers = sets, workers
        largest = max(member.bytes for one in sets for shard in one.manifest.shards for member in shard.members)
        # with less, streams would drive out each other's members, or what was read ahead for them
        self._bound = max(_MEMORY_BYTES, 2 * (streams + workers) * largest)
        self._cache = cache
        self._pool = ThreadPoolExecutor(workers, "members")
        self._members: OrderedDict[MemberKey, Future[Samples] | Samples] = OrderedDict()
        self._bytes = 0
        self._ahead: set[MemberKey] = set()  # expected, and not asked for yet

    @property
    def has_room(self) -> bool:
        """Whether more may be expected: enough for every thread, and never so much that what is in use has to go."""
        return len(self._ahead) < 2 * self.workers

    def expect(self, keys: Iterable[MemberKey]) -> None:
        """Begins to read members that are not here."""
        for key in keys:
            if key in self._members:
                self._members.move_to_end(key)
            else:
                self._ahead.add(key)
                self._members[key] = self._pool.submit(self._read, key)
                self._bytes += self._size(key)
        while self._bytes > self._bound:
            oldest, _ = self._members.popitem(last=False)
            self._ahead.discard(oldest)
            self._bytes -= self._size(oldest)

    def get(self, keys: Sequence[MemberKey]) -> list[Samples]:
        """The members of some samples. Raises UnreadableError: one cannot be read, or is not what was written."""
        found: list[Samples] = []
        for key in keys:
            member = self._members.get(key)
            if isinstance(member, Samples):  # so it is for most samples, and nothing more is done for them
                self._members.move_to_end(key)
                found.append(member)
            else:
                found.append(self._wait(key))
        return found

    def _wait(self, key: MemberKey) -> Samples:
        self.expect([key])
        self._ahead.discard(key)
        try:
            samples = cast("Future[Samples]", self._members[key]).result()
        except DataError as error:
            self._bytes -= self._size(key)
            del self._members[key]
            raise UnreadableError(key, error) from None
        self._members[key] = samples
        return samples

    def close(self) -> None:
        """Ends the threads, once they are through with the reads that they are at."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, key: MemberKey) -> Samples:
        which, shard, member = key
        manifest, folder = self.sets[which][:2]
        record, content = manifest.shards[shard], self._content(key)
        shape = manifest.stored_shape(manifest.shape_of(record))
        samples = _in_place(content, record.members[member].samples, shape, DTYPES[manifest.dtype])
        if samples and min(samples.labels) >= -1 and max(samples.labels) < len(manifest.class_names):
            return samples
        tensors = unpack_samples(content, folder, manifest, shard, member)
        latents = tensors["latents"].flatten(1).view(torch.uint8)
        content = latents.numpy().tobytes()
        return Samples(memoryview(content), latents.shape[1], tensors["ids"].tolist(), tensors["labels"].tolist())

    def _content(self, key: MemberKey) -> bytes:
        which, index, member = key
        manifest, folder, found = self.sets[which][:3]
        shard = manifest.shards[index]
        part = shard.members[member]
        name = f"{part.xxh3}-{part.bytes}"
        cached = None if self._cache is None else self._cache.get(name)
        if cached is not None and xxhash.xxh3_64_hexdigest(cached) == part.xxh3:
            return cached
        content = read_bytes(folder, shard, member, found.get(shard.name))
        if self._cache is not None:
            self._cache.put(name, content)
        return content

    def _size(self, key: MemberKey) -> int:
        which, shard, member = key
        return self.sets[which].manifest.shards[shard].members[member].bytes


def open_cache(config: DataConfig) -> MemberCache | None:
    """The disk cache that a configuration asks for. Raises ConfigError: its directory cannot be used."""
    return None if config.cache_dir is None else MemberCache(config.cache_dir, int(config.cache_gib * 2**30))


def stack(found: Sequence[tuple[Samples, int]], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Samples of one stored shape as one tensor [B, ...], in memory of its own."""
    # torch.stack takes 2.4 times as long for 8 KiB a sample, np.concatenate 1.7 times
    parts = [member.latents[index * member.size : (index + 1) * member.size] for member, index in found]
    return torch.frombuffer(bytearray().join(parts), dtype=dtype).view(len(found), *shape)


def _in_place(content: bytes, samples: int, shape: tuple[int, ...], dtype: torch.dtype) -> Samples | None:
    """A member without a copy of its latents, which would cost as much as to read them.

    None unless it begins and ends as `pack_samples` makes a member of so many samples.
    """
    header, size, first = _layout(samples, shape, dtype)
    if len(content) != size or not content.startswith(header):
        return None
    bytes_each = math.prod(shape) * dtype.itemsize
    ids, labels = (np.frombuffer(content, "<i8", samples, first[name]).tolist() for name in ("ids", "labels"))
    latents = memoryview(content)[first["latents"] : first["latents"] + samples * bytes_each]
    return Samples(latents, bytes_each, ids, labels)


@lru_cache(maxsize=256)
def _layout(samples: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, int, dict[str, int]]:
    """What a member of such samples begins with, its size, and where each of its tensors begins."""
    numbers = torch.zeros(samples, dtype=torch.int64)
    content = pack_samples(torch.zeros(samples, *shape, dtype=dtype), numbers, numbers)
    end = 8 + int.from_bytes(content[:8], "little")
    return content[:end], len(content), {k: end + v["data_offsets"][0] for k, v in json.loads(content[8:end]).items()}
