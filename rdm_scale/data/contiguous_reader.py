"""Contiguous reads of shards: threads prefetch them, and they stay in memory while they are in use."""

import math
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, cast

import xxhash

from rdm_scale.conditions import EncodedText
from rdm_scale.config import DataConfig
from rdm_scale.data.buffer_pool import BufferPool, as_memoryview
from rdm_scale.data.captions import unpack_text
from rdm_scale.data.dataset import OpenDataset
from rdm_scale.data.loaded_samples import LoadedSamples, parse_in_place, rewrite_in_place
from rdm_scale.data.manifest import TarIndex
from rdm_scale.data.order import ContiguousRead
from rdm_scale.data.shards import read_members, span_bytes, unpack_samples
from rdm_scale.dtypes import STORED_DTYPES
from rdm_scale.errors import DataError
from rdm_scale.storage.cache import MemberCache

KEPT_BYTES = 2**28  # reads kept in memory beyond those in use: a small data set is read only once


class UnreadableError(DataError):
    """A shard that cannot be read: its indices, and the error in `reason`."""

    def __init__(self, read: ContiguousRead, reason: DataError) -> None:
        super().__init__(str(reason))
        self.dataset, self.shard = read.dataset, read.shard
        self.reason = reason


class _Content(NamedTuple):
    """The bytes of a contiguous read, and those of each member."""

    buffer: memoryview
    members: list[memoryview]


class ContiguousReader:
    """Threads that carry out contiguous reads of several data sets, and a cache of the reads in memory.

    Memory holds `in_use` reads and two prefetched ones per worker, and more if they all fit in `KEPT_BYTES`. A failed
    read is retried when it is requested again.

    Args:
        in_use: number of reads that are in use at a time.
        largest: bytes of the largest read.
        workers: number of threads.
        captions: also read the captions from the side-car shards.
        buffers: memory to read into.
    """

    def __init__(
        self,
        datasets: Sequence[OpenDataset],
        *,
        in_use: int,
        largest: int,
        workers: int,
        cache: MemberCache | None,
        captions: bool = False,
        buffers: BufferPool | None = None,
    ) -> None:
        self.datasets, self.workers, self._captions = datasets, workers, captions
        if captions:
            tars = [(shard.bytes, shard.text) for one in datasets for shard in one.manifest.shards]
            largest = int(largest * max(1 + text.bytes / size for size, text in tars if text))
        self._limit = max(KEPT_BYTES, (in_use + 2 * workers) * largest)
        self._cache = cache
        self._buffers = buffers or BufferPool()
        self._pool = ThreadPoolExecutor(workers, "reads")
        self._reads: OrderedDict[ContiguousRead, Future[LoadedSamples] | LoadedSamples] = OrderedDict()  # by eviction
        self._bytes = 0
        self._ahead: set[ContiguousRead] = set()  # prefetched, and not requested yet

    @property
    def reads(self) -> list[ContiguousRead]:
        """Reads in memory or in progress; the first one is evicted first."""
        return list(self._reads)

    @property
    def has_room(self) -> bool:
        """True if more reads can be prefetched: up to two per thread, which never evicts reads in use."""
        return len(self._ahead) < 2 * self.workers

    def prefetch(self, reads: Iterable[ContiguousRead]) -> None:
        """Start the reads that are not in memory, as long as there is room."""
        for read in reads:
            if not self.has_room:
                return
            if read not in self._reads:
                self._ahead.add(read)
                self._start(read)

    def get(self, reads: Sequence[ContiguousRead]) -> list[LoadedSamples]:
        """Wait for reads and return their samples.

        Raises:
            UnreadableError: one cannot be read, or is not what was written.
        """
        distinct = dict.fromkeys(reads)
        for read in distinct:
            if read in self._reads:
                self._reads.move_to_end(read)
            else:
                self._start(read)
        loaded = {read: self._wait(read) for read in distinct}
        return [loaded[read] for read in reads]

    def release(self, reads: Iterable[ContiguousRead]) -> None:
        """Mark reads as no longer in use: they are evicted first."""
        for read in reads:
            if read in self._reads:
                self._reads.move_to_end(read, last=False)

    def close(self) -> None:
        """Stop the threads after their current reads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _start(self, read: ContiguousRead) -> None:
        self._reads[read] = self._pool.submit(self._load, read)
        self._bytes += self._size(read)
        while self._bytes > self._limit and len(self._reads) > 1:
            self._evict(next(iter(self._reads)))

    def _evict(self, read: ContiguousRead) -> None:
        del self._reads[read]
        self._ahead.discard(read)
        self._bytes -= self._size(read)

    def _wait(self, read: ContiguousRead) -> LoadedSamples:
        known = self._reads.get(read)
        if isinstance(known, LoadedSamples):
            return known
        if known is None:  # evicted again: more reads were requested at once than are kept
            self._start(read)
        self._ahead.discard(read)
        try:
            samples = cast("Future[LoadedSamples]", self._reads[read]).result()
        except DataError as error:
            self._evict(read)
            raise UnreadableError(read, error) from None
        self._reads[read] = samples
        return samples

    def _load(self, read: ContiguousRead) -> LoadedSamples:
        """Read and index the samples; runs in a thread."""
        dataset = self.datasets[read.dataset]
        manifest = dataset.manifest
        shard, dtype = manifest.shards[read.shard], STORED_DTYPES[manifest.dtype]
        content = self._content(shard, read)
        shape = manifest.stored_shape(manifest.shape_of(shard))
        size = math.prod(shape) * dtype.bytes
        loaded = LoadedSamples(content.buffer, array("q"), size, array("q"), array("q"), [])
        offset = shard.members[read.first].offset
        for number, member in enumerate(content.members, read.first):
            record = shard.members[number]
            parsed = parse_in_place(member, record.samples, shape, dtype.torch)
            if parsed is None or min(parsed.labels) < -1 or max(parsed.labels) >= len(manifest.class_names):
                tensors = unpack_samples(bytes(member), dataset.folder, manifest, read.shard, number)
                parsed = rewrite_in_place(member, tensors)
            first = record.offset - offset + parsed.start
            loaded.starts.extend(range(first, first + record.samples * size, size))
            loaded.ids.extend(parsed.ids)
            loaded.labels.extend(parsed.labels)
        if self._captions:
            loaded.captions.extend(self._load_captions(read, loaded.ids.tolist()))
        return loaded

    def _load_captions(self, read: ContiguousRead, ids: list[int]) -> list[EncodedText]:
        """Captions of the samples with these ids, from the side-car."""
        dataset = self.datasets[read.dataset]
        tar, encoding = dataset.manifest.shards[read.shard].text, dataset.manifest.text
        assert tar is not None and encoding is not None
        dtype = STORED_DTYPES[encoding.dtype].torch
        captions: list[EncodedText] = []
        members = self._content(tar, read).members
        for content, record in zip(members, tar.members[read.first : read.end], strict=True):
            where = f"{dataset.folder / tar.name}, member {record.name}"
            text = unpack_text(bytes(content), record.samples, encoding.width, encoding.pooled_width, dtype, where)
            if text.ids.tolist() != ids[len(captions) : len(captions) + record.samples]:
                raise DataError(f"{where} has captions of other samples than its shard: encode the data again")
            tokens = text.tokens.split(text.offsets.diff().tolist())
            captions += map(EncodedText, tokens, text.pooled)
        return captions

    def _content(self, tar: TarIndex, read: ContiguousRead) -> _Content:
        """Read the members from the disk cache, or by one request."""
        dataset, records = self.datasets[read.dataset], tar.members[read.first : read.end]
        buffer = as_memoryview(self._buffers.take(span_bytes(tar, read.first, read.end)))
        names = [f"{record.xxh3}-{record.bytes}" for record in records]
        if self._cache is not None:
            places = [buffer[record.offset - records[0].offset :][: record.bytes] for record in records]
            if all(_copy_cached(self._cache, name, place) for name, place in zip(names, places, strict=True)):
                return _Content(buffer, places)
        members = read_members(dataset.folder, tar, read.first, read.end, buffer, dataset.files.get(tar.name))
        if self._cache is not None:
            for name, member in zip(names, members, strict=True):
                self._cache.put(name, member)
        return _Content(buffer, members)

    def _size(self, read: ContiguousRead) -> int:
        shard = self.datasets[read.dataset].manifest.shards[read.shard]
        text = span_bytes(shard.text, read.first, read.end) if self._captions and shard.text else 0
        return span_bytes(shard, read.first, read.end) + text


def _copy_cached(cache: MemberCache, name: str, place: memoryview) -> bool:
    """Copy a member from the cache; False if it is not there or its checksum differs."""
    content = cache.get(name)
    if content is None or len(content) != len(place) or f"{xxhash.xxh3_64_hexdigest(content)}-{len(content)}" != name:
        return False
    place[:] = content
    return True


def open_cache(config: DataConfig) -> MemberCache | None:
    """The disk cache of a configuration, or None without `data.cache_dir`.

    Raises:
        ConfigError: the directory cannot be used.
    """
    return None if config.cache_dir is None else MemberCache(config.cache_dir, int(config.cache_gib * 2**30))
