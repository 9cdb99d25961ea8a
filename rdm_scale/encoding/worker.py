"""One rank's part of an encoding: pixels are loaded in threads and put together in another, encoded here, and packed
and written in one more.

The codec is what an encoding waits for; everything else happens beside it.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rdm_scale.codecs import LatentCodec, normalize
from rdm_scale.codecs.record import CodecRecord
from rdm_scale.data.captions import pack_text
from rdm_scale.data.manifest import Shard, TarIndex
from rdm_scale.data.shards import PackedMember, pack_samples, sample_id, write_tar
from rdm_scale.dtypes import STORED_DTYPES
from rdm_scale.encoding.inputs import MediaSet
from rdm_scale.encoding.pixels import READERS, load
from rdm_scale.encoding.planning import Item, PlannedShard, Settings
from rdm_scale.encoding.records import Record, Rejected
from rdm_scale.encoding.text import TextEncoder
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location

_BATCHES_AHEAD = 2
_SHARDS_UNWRITTEN = 2  # that may wait for the writing thread


@dataclass(frozen=True)
class Batch:
    """What could be loaded of some items, where the codec is, and why others could not, by their place among all."""

    items: list[Item]
    pixels: Tensor | None  # [B, 3, T, H, W]
    rejected: list[tuple[int, str]]

    def __len__(self) -> int:
        return len(self.items) + len(self.rejected)


@dataclass
class Statistics:
    """Of normalized latents, over the posterior too when the moments are kept."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, latents: Tensor, record: CodecRecord, kind: str) -> None:
        """Takes in raw latents [B, C or 2C, T, H, W]."""
        mean, log_variance = latents.double(), None
        if kind == "moments":
            mean, log_variance = mean.chunk(2, dim=1)
        unit = normalize(mean, record)
        self.count += unit.numel()
        self.total += float(unit.sum())
        self.squares += float(unit.square().sum())
        if log_variance is not None:
            deviation = normalize(mean + (0.5 * log_variance).exp(), record) - unit
            self.squares += float(deviation.square().sum())


@dataclass
class ShardLatents:
    """A shard while it is being encoded."""

    items: list[Item] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)  # as they are stored
    rejected: list[Rejected] = field(default_factory=list)
    statistics: Statistics = field(default_factory=Statistics)


class Worker:
    """Encodes shards of a plan.

    Args:
        folder_of: the folder of a side.
        text: encodes the captions; None without captions.
    """

    def __init__(
        self,
        source: MediaSet,
        settings: Settings,
        codec: LatentCodec,
        text: TextEncoder | None,
        folder_of: Callable[[str], Location],
    ) -> None:
        self.source, self.settings, self.codec, self.text = source, settings, codec, text
        self._folder_of = folder_of
        # On a GPU pixels arrive while the codec works: on the stream of its kernels they would wait for these.
        self._arrivals = torch.cuda.Stream(codec.device) if codec.device.type == "cuda" else None

    def run(
        self,
        shards: Sequence[PlannedShard],
        written: Callable[[PlannedShard, Record], None],
        progress: Callable[[int], object],
    ) -> None:
        """Encodes and writes shards.

        Args:
            written: called after a shard, by the writing thread.
            progress: called with the number of samples after each batch.

        Raises:
            DataError: a latent is not finite in the dtype, or a vector of a caption.
            OSError: a shard cannot be written.
        """

        def finish(planned: PlannedShard, encoded: ShardLatents) -> None:
            written(planned, self._write(planned, encoded))

        with (
            ThreadPoolExecutor(READERS, "pixels") as readers,
            ThreadPoolExecutor(1, "batches") as gatherer,
            ThreadPoolExecutor(1, "shards") as writer,
        ):
            batches = self._loading(shards, readers, gatherer)
            unwritten: deque[Future[None]] = deque()
            try:
                for planned in shards:
                    unwritten.append(writer.submit(finish, planned, self._encode(planned, batches, progress)))
                    while len(unwritten) > _SHARDS_UNWRITTEN:
                        unwritten.popleft().result()
                for pending in unwritten:
                    pending.result()
            except BaseException:
                gatherer.shutdown(wait=False, cancel_futures=True)
                readers.shutdown(wait=False, cancel_futures=True)
                writer.shutdown(wait=False, cancel_futures=True)
                raise

    def _loading(
        self, shards: Sequence[PlannedShard], readers: ThreadPoolExecutor, gatherer: ThreadPoolExecutor
    ) -> Iterator[Batch]:
        """The batches of all shards in turn; while one is in use the next ones are being loaded."""
        loading: deque[Future[Batch]] = deque()
        for shard in shards:
            for items in shard.batches(self.settings.batch_size):
                each = [readers.submit(load, self.source, item, shard.bucket, self.settings) for item in items]
                loading.append(gatherer.submit(self._gather, items, each))
                if len(loading) > _BATCHES_AHEAD:
                    yield loading.popleft().result()
        yield from (batch.result() for batch in loading)

    def _gather(self, items: Sequence[Item], loading: "Sequence[Future[Tensor]]") -> Batch:
        kept, pixels, rejected = [], [], []
        for place, (item, each) in enumerate(zip(items, loading, strict=True)):
            try:
                pixels.append(each.result())
                kept.append(item)
            except DataError as error:
                rejected.append((place, str(error)))
        return Batch(kept, self._together(pixels) if pixels else None, rejected)

    def _together(self, pixels: Sequence[Tensor]) -> Tensor:
        """One tensor where the codec is. Its memory may be used again once the latents made of it are on the CPU."""
        if self._arrivals is None:
            return torch.stack([*pixels])
        pinned = torch.empty(len(pixels), *pixels[0].shape, pin_memory=True)
        torch.stack([*pixels], out=pinned)
        with torch.cuda.stream(self._arrivals):
            there = pinned.to(self.codec.device, non_blocking=True)
        self._arrivals.synchronize()
        return there

    def _encode(self, shard: PlannedShard, batches: Iterator[Batch], progress: Callable[[int], object]) -> ShardLatents:
        encoded = ShardLatents()
        seen = 0
        for _ in shard.batches(self.settings.batch_size):
            batch = next(batches)
            encoded.items += batch.items
            encoded.rejected += (Rejected(seen + place, reason) for place, reason in batch.rejected)
            seen += len(batch)
            if batch.pixels is not None:
                latents = self._latents(batch.items, batch.pixels)
                encoded.latents.append(latents)
                encoded.statistics.add(latents, self.codec.record, self.settings.kind)
            progress(len(batch))
        return encoded

    def _latents(self, items: Sequence[Item], pixels: Tensor) -> Tensor:
        """[B, C or 2C, T, H, W] as they are stored."""
        settings, codec = self.settings, self.codec
        moments = codec.encode(pixels)
        kept = moments if settings.kind == "moments" else moments[:, : codec.channels]
        latents = kept.to("cpu", STORED_DTYPES[settings.dtype].torch)
        finite = latents.flatten(1).isfinite().all(dim=1)
        if not finite.all():
            worst = self.source.files[items[int(finite.int().argmin())].file]
            raise DataError(
                f"the codec {codec.record.location} makes latents of {worst.name} that are not finite in "
                f"{settings.dtype}: encode with --dtype float32, or another codec"
            )
        return latents

    def _write(self, planned: PlannedShard, encoded: ShardLatents) -> Record:
        cut = 0 if self.text is None else self.text.truncated
        shard = self._write_shard(planned, encoded) if encoded.items else None
        return Record(
            shard=shard,
            rejected=tuple(encoded.rejected),
            truncated=0 if self.text is None else self.text.truncated - cut,
            **vars(encoded.statistics),
        )

    def _write_shard(self, planned: PlannedShard, encoded: ShardLatents) -> Shard:
        files, settings, folder = self.source.files, self.settings, self._folder_of(planned.side)
        latents = torch.cat(encoded.latents)
        ids = torch.tensor([sample_id(files[item.file].key, item.clip, item.view) for item in encoded.items])
        labels = torch.tensor([files[item.file].label for item in encoded.items])
        captions = [files[item.file].caption or "" for item in encoded.items]
        members: list[PackedMember] = []
        texts: list[PackedMember] = []
        for first in range(0, len(ids), settings.samples_per_member):
            part = slice(first, first + settings.samples_per_member)
            name = f"{planned.number * settings.members_per_shard + len(members):08d}.safetensors"
            members.append(PackedMember(name, len(ids[part]), pack_samples(latents[part], ids[part], labels[part])))
            if self.text is not None:
                content = pack_text(self.text.encode(captions[part]), ids[part], STORED_DTYPES[settings.dtype].torch)
                texts.append(PackedMember(name, len(ids[part]), content))
        # The side-car first: beside a shard that is there, its captions are.
        side_car: TarIndex | None = write_tar(folder, f"text-{planned.number:06d}.tar", texts) if texts else None
        tar = write_tar(folder, f"shard-{planned.number:06d}.tar", members)
        shape = self.codec.latent_shape(*planned.bucket)
        return Shard(**dict(tar), samples=len(ids), shape=shape, text=side_car)
