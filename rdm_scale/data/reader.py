"""Runs of members of shards, read by threads ahead of their use and kept while they are in use."""

import json
import math
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple, cast

import numpy as np
import torch
import xxhash
from torch import Tensor

from rdm_scale.codecs.codec import normalize_
from rdm_scale.codecs.record import CodecRecord
from rdm_scale.config import DataConfig, DataSource
from rdm_scale.data.buffer_pool import MEMORY, as_bytes
from rdm_scale.data.captions import unpack_text
from rdm_scale.data.manifest import Manifest, TarIndex, read_manifest
from rdm_scale.data.order import Run
from rdm_scale.data.shards import pack_samples, read_run, span, unpack_samples
from rdm_scale.dtypes import STORED_DTYPES
from rdm_scale.errors import DataError
from rdm_scale.storage.cache import MemberCache
from rdm_scale.storage.location import Location, Stat

_MEMORY_BYTES = 2**28  # of runs kept, at least: a small set is read once
_LARGE_BYTES = 2**16  # of a sample: to make a tensor of it costs nothing beside its copy
_BLOCK_BYTES = 2**20  # of small samples that are gathered and converted at a time


class OpenDataset(NamedTuple):
    """A set of shards whose manifest has been read and whose files have been looked at."""

    manifest: Manifest
    folder: Location
    found: dict[str, Stat]  # the files, as they were when the set was opened
    damaged: dict[int, DataError]  # shards that are missing or have another size than the manifest says
    weight: float


Caption = tuple[Tensor, Tensor]  # tokens [n, D] and the pooled vector [P]


class Samples(NamedTuple):
    """A run, taken apart so that one of its samples costs little to look up: in arrays, since lists hold pointers."""

    content: memoryview  # its bytes
    starts: "array[int]"  # where the raw latents of each sample begin in them
    size: int  # of a sample, in bytes
    ids: "array[int]"
    labels: "array[int]"
    captions: list[Caption]  # where they are read

    def take(self, order: Sequence[int]) -> "Samples":
        """These of them, modulo their number, in this order."""
        indices = [index % len(self.ids) for index in order]
        return self._replace(
            starts=array("q", [self.starts[i] for i in indices]),
            ids=array("q", [self.ids[i] for i in indices]),
            labels=array("q", [self.labels[i] for i in indices]),
            captions=[self.captions[i] for i in indices] if self.captions else [],
        )


class UnreadableError(DataError):
    """A run of a set cannot be read."""

    def __init__(self, run: Run, reason: DataError) -> None:
        super().__init__(str(reason))
        self.set, self.shard = run.set, run.shard
        self.reason = reason


def open_dataset(source: DataSource, options: dict[str, object] | None = None) -> OpenDataset:
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
    return OpenDataset(manifest, folder, found, damaged, source.weight)


def _wrong_size(place: Location, tar: TarIndex, found: Stat | None) -> str | None:
    if found is None:
        return f"{place} is missing, and the manifest lists it"
    if found.bytes != tar.bytes:
        return f"{place} has {found.bytes} bytes, the manifest says {tar.bytes}"
    return None


class RunReader:
    """Reads runs of several sets.

    Those in use are kept, `streams` of them, beside two for each worker that are read ahead; more only while that is
    little memory. A run whose read has failed is read again when it is asked for again.

    Args:
        streams: how many runs are in use at a time.
        largest: bytes of the largest run.
        captions: read those of the side-cars, too.
    """

    def __init__(
        self,
        sets: Sequence[OpenDataset],
        *,
        streams: int,
        largest: int,
        workers: int,
        cache: MemberCache | None,
        captions: bool = False,
    ) -> None:
        self.datasets, self.workers, self._captions = sets, workers, captions
        if captions:
            tars = [(shard.bytes, shard.text) for one in sets for shard in one.manifest.shards]
            largest = int(largest * max(1 + text.bytes / size for size, text in tars if text))
        self._bound = max(_MEMORY_BYTES, (streams + 2 * workers) * largest)
        self._cache = cache
        self._pool = ThreadPoolExecutor(workers, "runs")
        self._runs: OrderedDict[Run, Future[Samples] | Samples] = OrderedDict()  # those to be dropped first, first
        self._bytes = 0
        self._ahead: set[Run] = set()  # expected, and not asked for yet

    @property
    def has_room(self) -> bool:
        """Whether more may be expected: enough for every thread, and never so much that what is in use has to go."""
        return len(self._ahead) < 2 * self.workers

    def expect(self, runs: Iterable[Run]) -> None:
        """Begins to read runs that are not here, as far as there is room."""
        for run in runs:
            if not self.has_room:
                return
            if run not in self._runs:
                self._ahead.add(run)
                self._begin(run)

    def get(self, runs: Sequence[Run]) -> list[Samples]:
        """The runs of some samples. Raises UnreadableError: one cannot be read, or is not what was written."""
        distinct = dict.fromkeys(runs)
        for run in distinct:
            if run in self._runs:
                self._runs.move_to_end(run)
            else:
                self._begin(run)
        found = {run: self._wait(run) for run in distinct}
        return [found[run] for run in runs]

    def release(self, runs: Iterable[Run]) -> None:
        """These are not in use any more: they are the first to go."""
        for run in runs:
            if run in self._runs:
                self._runs.move_to_end(run, last=False)

    def close(self) -> None:
        """Ends the threads, once they are through with the reads that they are at."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, run: Run) -> None:
        self._runs[run] = self._pool.submit(self._read, run)
        self._bytes += self._size(run)
        while self._bytes > self._bound and len(self._runs) > 1:
            self._drop(next(iter(self._runs)))

    def _drop(self, run: Run) -> None:
        del self._runs[run]
        self._ahead.discard(run)
        self._bytes -= self._size(run)

    def _wait(self, run: Run) -> Samples:
        known = self._runs.get(run)
        if isinstance(known, Samples):
            return known
        if known is None:  # it was dropped again: more are asked for at once than are kept
            self._begin(run)
        self._ahead.discard(run)
        try:
            samples = cast("Future[Samples]", self._runs[run]).result()
        except DataError as error:
            self._drop(run)
            raise UnreadableError(run, error) from None
        self._runs[run] = samples
        return samples

    def _read(self, run: Run) -> Samples:
        manifest, folder = self.datasets[run.set][:2]
        record = manifest.shards[run.shard]
        content, members = self._content(record, run)
        shape = manifest.stored_shape(manifest.shape_of(record))
        size = math.prod(shape) * STORED_DTYPES[manifest.dtype].bytes
        found = Samples(content, array("q"), size, array("q"), array("q"), [])
        begin = record.members[run.first].offset
        for number, member in enumerate(members, run.first):
            part = record.members[number]
            tensors = _in_place(member, part.samples, shape, STORED_DTYPES[manifest.dtype].torch)
            if tensors is None or min(tensors.labels) < -1 or max(tensors.labels) >= len(manifest.class_names):
                tensors = _rewritten(member, unpack_samples(bytes(member), folder, manifest, run.shard, number))
            first = part.offset - begin + tensors.start
            found.starts.extend(range(first, first + part.samples * size, size))
            found.ids.extend(tensors.ids)
            found.labels.extend(tensors.labels)
        if self._captions:
            found.captions.extend(self._read_captions(run, found.ids.tolist()))
        return found

    def _read_captions(self, run: Run, ids: list[int]) -> list[Caption]:
        """Those of the samples of a run."""
        manifest, folder = self.datasets[run.set][:2]
        tar, how = manifest.shards[run.shard].text, manifest.text
        assert tar is not None and how is not None
        captions: list[Caption] = []
        for content, part in zip(self._content(tar, run)[1], tar.members[run.first : run.end], strict=True):
            where = f"{folder / tar.name}, member {part.name}"
            text = unpack_text(
                bytes(content), part.samples, how.width, how.pooled_width, STORED_DTYPES[how.dtype].torch, where
            )
            if text.ids.tolist() != ids[len(captions) : len(captions) + part.samples]:
                raise DataError(f"{where} has captions of other samples than its shard: encode the data again")
            captions += zip(text.tokens.split(text.offsets.diff().tolist()), text.pooled, strict=True)
        return captions

    def _content(self, tar: TarIndex, run: Run) -> tuple[memoryview, list[memoryview]]:
        """The bytes of a run of a tar, and those of each of its members."""
        _, folder, found = self.datasets[run.set][:3]
        buffer = as_bytes(MEMORY.take(span(tar, run.first, run.end)))
        parts = tar.members[run.first : run.end]
        names = [f"{part.xxh3}-{part.bytes}" for part in parts]
        if self._cache is not None:
            places = [buffer[part.offset - parts[0].offset :][: part.bytes] for part in parts]
            if all(self._cached(name, place) for name, place in zip(names, places, strict=True)):
                return buffer, places
        members = read_run(folder, tar, run.first, run.end, buffer, found.get(tar.name))
        if self._cache is not None:
            for name, member in zip(names, members, strict=True):
                self._cache.put(name, member)
        return buffer, members

    def _cached(self, name: str, place: memoryview) -> bool:
        """Fills a place from the cache, if it can."""
        assert self._cache is not None
        content = self._cache.get(name)
        if (
            content is None
            or len(content) != len(place)
            or f"{xxhash.xxh3_64_hexdigest(content)}-{len(content)}" != name
        ):
            return False
        place[:] = content
        return True

    def _size(self, run: Run) -> int:
        shard = self.datasets[run.set].manifest.shards[run.shard]
        text = span(shard.text, run.first, run.end) if self._captions and shard.text else 0
        return span(shard, run.first, run.end) + text


def open_cache(config: DataConfig) -> MemberCache | None:
    """The disk cache that a configuration asks for. Raises ConfigError: its directory cannot be used."""
    return None if config.cache_dir is None else MemberCache(config.cache_dir, int(config.cache_gib * 2**30))


def stack(found: Sequence[tuple[Samples, int]], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Samples of one stored shape as one tensor [B, ...], in memory of its own."""
    size = found[0][0].size
    # of 8 KiB samples: one slice assigned after another, torch.stack and np.concatenate all take longer
    content = bytearray().join([run.content[(start := run.starts[i]) : start + size] for run, i in found])
    return torch.frombuffer(content, dtype=dtype).view(len(found), *shape)


def stack_as_float(
    found: Sequence[tuple[Samples, int]], shape: Sequence[int], dtype: torch.dtype, codec: CodecRecord | None = None
) -> Tensor:
    """`stack` in float32 and, with a codec, brought to unit scale.

    By blocks, so that a pass finds in the processor's cache what the one before has left there: large samples one by
    one, where they lie.
    """
    size = found[0][0].size
    target = MEMORY.take(len(found) * math.prod(shape) * 4).view(torch.float32).view(len(found), *shape)
    together = 1 if size >= _LARGE_BYTES else _BLOCK_BYTES // size
    for number, block in enumerate(target.split(together)):
        block.copy_(_stored(found[number * together :][:together], shape, dtype))
        if codec is not None:
            normalize_(block, codec)
    return target


def _stored(found: Sequence[tuple[Samples, int]], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`stack`, but of a single sample where it lies."""
    if len(found) > 1:
        return stack(found, shape, dtype)
    ((run, index),) = found
    raw = torch.frombuffer(run.content, dtype=torch.uint8, count=run.size, offset=run.starts[index])
    return raw.view(dtype).view(1, *shape)


class _Tensors(NamedTuple):
    """Of a member: where its latents begin in it, and the rest."""

    start: int
    ids: list[int]
    labels: list[int]


def _in_place(content: memoryview, samples: int, shape: tuple[int, ...], dtype: torch.dtype) -> _Tensors | None:
    """A member without a copy of its latents, which would cost as much as to read them.

    None unless it begins and ends as `pack_samples` makes a member of so many samples.
    """
    header, size, first = _layout(samples, shape, dtype)
    if len(content) != size or content[: len(header)] != header:
        return None
    ids, labels = (np.frombuffer(content, "<i8", samples, first[name]).tolist() for name in ("ids", "labels"))
    return _Tensors(first["latents"], ids, labels)


def _rewritten(content: memoryview, tensors: dict[str, Tensor]) -> _Tensors:
    """A member in another form of safetensors: the latents go to its beginning."""
    latents = as_bytes(tensors["latents"].flatten().view(torch.uint8))
    content[: len(latents)] = latents
    return _Tensors(0, tensors["ids"].tolist(), tensors["labels"].tolist())


@lru_cache(maxsize=256)
def _layout(samples: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, int, dict[str, int]]:
    """What a member of such samples begins with, its size, and where each of its tensors begins."""
    numbers = torch.zeros(samples, dtype=torch.int64)
    content = pack_samples(torch.zeros(samples, *shape, dtype=dtype), numbers, numbers)
    end = 8 + int.from_bytes(content[:8], "little")
    return content[:end], len(content), {k: end + v["data_offsets"][0] for k, v in json.loads(content[8:end]).items()}
