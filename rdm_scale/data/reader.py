"""Members of shards, read by threads ahead of their use and kept while they are in use."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from rdm_scale.config import DataConfig, DataSource
from rdm_scale.data.cache import MemberCache
from rdm_scale.data.manifest import Manifest, Tar, read_manifest
from rdm_scale.data.order import Place
from rdm_scale.data.shards import read_bytes, unpack_samples
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

    latents: Sequence[Tensor]  # [C or 2C, T, H, W] each, raw
    ids: list[int]
    labels: list[int]


class MemberKey(NamedTuple):
    set: int
    shard: int
    member: int


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
        self._members: OrderedDict[MemberKey, Future[Samples]] = OrderedDict()
        self._bytes = 0
        self._ahead: set[MemberKey] = set()  # expected, and not asked for yet

    @property
    def has_room(self) -> bool:
        """Whether more may be expected: enough for every thread, and never so much that what is in use has to go."""
        return len(self._ahead) < 2 * self.workers

    def expect(self, keys: Iterable[MemberKey]) -> None:
        """Begins to read members that are not here."""
        for key in keys:
            if key not in self._members:
                self._ahead.add(key)
                self._members[key] = self._pool.submit(self._read, key)
                self._bytes += self._size(key)
            self._members.move_to_end(key)
        while self._bytes > self._bound:
            oldest, _ = self._members.popitem(last=False)
            self._ahead.discard(oldest)
            self._bytes -= self._size(oldest)

    def get(self, key: MemberKey) -> Samples:
        """A member. Raises DataError: it cannot be read, or is not what was written."""
        self.expect([key])
        self._ahead.discard(key)
        try:
            return self._members[key].result()
        except DataError:
            self._bytes -= self._size(key)
            del self._members[key]
            raise

    def close(self) -> None:
        """Ends the threads, and waits for the reads that they are at."""
        self._pool.shutdown(cancel_futures=True)

    def _read(self, key: MemberKey) -> Samples:
        manifest, folder = self.sets[key.set][:2]
        tensors = unpack_samples(self._content(key), folder, manifest, key.shard, key.member)
        return Samples(tensors["latents"].unbind(), tensors["ids"].tolist(), tensors["labels"].tolist())

    def _content(self, key: MemberKey) -> bytes:
        manifest, folder, found = self.sets[key.set][:3]
        shard = manifest.shards[key.shard]
        part = shard.members[key.member]
        name = f"{part.xxh3}-{part.bytes}"
        cached = None if self._cache is None else self._cache.get(name)
        if cached is not None and xxhash.xxh3_64_hexdigest(cached) == part.xxh3:
            return cached
        content = read_bytes(folder, shard, key.member, found.get(shard.name))
        if self._cache is not None:
            self._cache.put(name, content)
        return content

    def _size(self, key: MemberKey) -> int:
        return self.sets[key.set].manifest.shards[key.shard].members[key.member].bytes


def open_cache(config: DataConfig) -> MemberCache | None:
    """The disk cache that a configuration asks for. Raises ConfigError: its directory cannot be used."""
    return None if config.cache_dir is None else MemberCache(config.cache_dir, int(config.cache_gib * 2**30))


def key_of(set_index: int, place: Place) -> MemberKey:
    return MemberKey(set_index, place.shard, place.member)


def stack(found: Sequence[tuple[Samples, int]]) -> Tensor:
    """Samples as one float32 tensor [B, ...]."""
    return torch.stack([samples.latents[index] for samples, index in found]).float()
