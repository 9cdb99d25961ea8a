"""One rank's share of an encoding job: load pixels, encode them, pack and write shards.

Threads load and write while the codec, the bottleneck of encoding, runs.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rdm_scale.codecs import normalize
from rdm_scale.codecs.codec import clamp_log_variance
from rdm_scale.data.captions import pack_text
from rdm_scale.data.manifest import Shard, TarIndex
from rdm_scale.data.shard_writer import PackedMember, pack_samples, sample_id, write_tar
from rdm_scale.dtypes import STORED_DTYPES
from rdm_scale.encoding.job import EncodingJob
from rdm_scale.encoding.moments import MomentAccumulator
from rdm_scale.encoding.pixels import DECODING_VERSION, READERS, load_sample
from rdm_scale.encoding.planning import PixelBucket, PlannedSample, PlannedShard
from rdm_scale.encoding.records import RejectedSample, ShardRecord
from rdm_scale.encoding.rejections import RejectionPolicy
from rdm_scale.encoding.remarks import Remarks
from rdm_scale.errors import DataError

_BATCHES_AHEAD = 2
_SHARDS_UNWRITTEN = 2  # encoded shards that may wait for the writing thread

# load: read and decode a sample (reading threads); collate: wait for the samples of a batch and stack them (a thread);
# wait: for a batch, or for a shard to be written; encode, statistics: of a batch; write: pack and write a shard (a
# thread).
WorkerStage = Literal["load", "collate", "wait", "encode", "statistics", "write"]
StageTrace = Callable[[WorkerStage], AbstractContextManager[object]]


def no_trace(stage: WorkerStage) -> AbstractContextManager[object]:
    """Trace that does nothing."""
    return nullcontext()


class LoadedPixels(NamedTuple):
    """Pixels [3, T, H, W] of a sample, and what was found to say about it."""

    pixels: Tensor
    remarks: Remarks


@dataclass(frozen=True)
class LoadedBatch:
    """Samples that could be loaded, with their pixels on the codec's device, and those that could not."""

    samples: list[PlannedSample]
    pixels: Tensor | None  # [B, 3, T, H, W]; None: no sample could be loaded
    rejected: list[RejectedSample]  # by position in the batch
    remarks: Remarks

    def __len__(self) -> int:
        return len(self.samples) + len(self.rejected)


@dataclass
class EncodedShard:
    """Latents of a planned shard, batch by batch as they are encoded."""

    samples: list[PlannedSample] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)  # of each batch, in the dtype they are stored in
    rejected: list[RejectedSample] = field(default_factory=list)
    remarks: Remarks = field(default_factory=Remarks)
    moments: MomentAccumulator = field(default_factory=MomentAccumulator)  # of the normalized latents


class Worker:
    """Encoder of the shards of a plan: it loads pixels, runs the codec, and writes shards and their captions.

    Args:
        trace: context manager entered around each stage, in the thread that runs it.
    """

    def __init__(self, job: EncodingJob, trace: StageTrace = no_trace) -> None:
        self._job, self._trace = job, trace
        self._policy = RejectionPolicy(len(job.source.files), job.max_unreadable)
        # On the stream of the codec's kernels, copies of pixels would wait for these.
        cuda = job.codec.device.type == "cuda"
        self._copy_stream = torch.cuda.Stream(job.codec.device) if cuda else None

    def run(
        self,
        shards: Sequence[PlannedShard],
        written: Callable[[PlannedShard, ShardRecord], None],
        progress: Callable[[int], object],
    ) -> None:
        """Encode and write shards.

        Args:
            written: called after each shard, by the writing thread.
            progress: called with the number of samples after each batch.

        Raises:
            DataError: a latent, or a vector of a caption, is not finite in the dtype.
            StorageError: more inputs are unreadable than are allowed.
            OSError: a shard cannot be written.
        """

        def finish(planned: PlannedShard, encoded: EncodedShard) -> None:
            with self._trace("write"):
                record = self._write(planned, encoded)
            written(planned, record)

        with (
            ThreadPoolExecutor(READERS, "pixels") as readers,
            ThreadPoolExecutor(1, "batches") as collator,
            ThreadPoolExecutor(1, "shards") as writer,
        ):
            batches = self._load_batches(shards, readers, collator)
            unwritten: deque[Future[None]] = deque()
            try:
                for planned in shards:
                    unwritten.append(writer.submit(finish, planned, self._encode(planned, batches, progress)))
                    while len(unwritten) > _SHARDS_UNWRITTEN:
                        with self._trace("wait"):
                            unwritten.popleft().result()
                for pending in unwritten:
                    with self._trace("wait"):
                        pending.result()
            except BaseException:
                for pool in (collator, readers, writer):
                    pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _load_batches(
        self, shards: Sequence[PlannedShard], readers: ThreadPoolExecutor, collator: ThreadPoolExecutor
    ) -> Iterator[LoadedBatch]:
        """Yield the loaded batches of all shards in their order; the next ones are loaded in advance."""
        loading: deque[Future[LoadedBatch]] = deque()
        for shard in shards:
            for samples in shard.batches(self._job.settings.batch_size):
                pixels = [readers.submit(self._load, sample, shard.bucket) for sample in samples]
                loading.append(collator.submit(self._collate, samples, pixels))
                if len(loading) > _BATCHES_AHEAD:
                    yield self._await(loading.popleft())
        for batch in loading:
            yield self._await(batch)

    def _await(self, batch: "Future[LoadedBatch]") -> LoadedBatch:
        with self._trace("wait"):
            return batch.result()

    def _load(self, sample: PlannedSample, bucket: PixelBucket) -> LoadedPixels:
        remarks = Remarks()
        with self._trace("load"):
            return LoadedPixels(load_sample(self._job.source, sample, bucket, self._job.settings, remarks), remarks)

    def _collate(self, samples: Sequence[PlannedSample], loading: "Sequence[Future[LoadedPixels]]") -> LoadedBatch:
        loaded, pixels, rejected, remarks = [], [], [], Remarks()
        with self._trace("collate"):
            for position, (sample, future) in enumerate(zip(samples, loading, strict=True)):
                try:
                    one = future.result()
                    pixels.append(one.pixels)
                    remarks.include(one.remarks.found)
                    loaded.append(sample)
                except DataError as error:
                    rejection = self._policy.reject(error, self._job.source.files[sample.file])
                    rejected.append(RejectedSample(position, *rejection))
            return LoadedBatch(loaded, self._stack(pixels) if pixels else None, rejected, remarks)

    def _stack(self, pixels: Sequence[Tensor]) -> Tensor:
        """Stack pixels on the codec's device."""
        if self._copy_stream is None:
            return torch.stack([*pixels])
        pinned = torch.empty(len(pixels), *pixels[0].shape, pin_memory=True)
        torch.stack([*pixels], out=pinned)
        with torch.cuda.stream(self._copy_stream):
            on_device = pinned.to(self._job.codec.device, non_blocking=True)
        # The allocator may reuse this memory as soon as the batch is freed. That is safe, since the latents have been
        # copied to the CPU by then, after all kernels that read the pixels.
        self._copy_stream.synchronize()
        return on_device

    def _encode(
        self, shard: PlannedShard, batches: Iterator[LoadedBatch], progress: Callable[[int], object]
    ) -> EncodedShard:
        encoded = EncodedShard()
        seen = 0
        for _ in shard.batches(self._job.settings.batch_size):
            batch = next(batches)
            encoded.samples += batch.samples
            encoded.rejected += (one._replace(position=seen + one.position) for one in batch.rejected)
            encoded.remarks.include(batch.remarks.found)
            seen += len(batch)
            if batch.pixels is not None:
                latents = self._latents(batch.samples, batch.pixels)
                encoded.latents.append(latents)
                with self._trace("statistics"):
                    self._add_moments(encoded.moments, latents)
            progress(len(batch))
        return encoded

    def _latents(self, samples: Sequence[PlannedSample], pixels: Tensor) -> Tensor:
        """Encode pixels to latents or moments [B, C or 2C, T, H, W], as they are stored."""
        settings, codec = self._job.settings, self._job.codec
        with self._trace("encode"):
            moments = codec.encode(pixels)
        kept = moments if settings.kind == "moments" else moments[:, : codec.channels]
        latents = kept.to("cpu", STORED_DTYPES[settings.dtype].torch)
        finite = latents.flatten(1).isfinite().all(dim=1)
        if not finite.all():
            broken = self._job.source.files[samples[int(finite.int().argmin())].file]
            raise DataError(
                f"the codec {codec.record.location} encodes {broken.name} to latents that are not finite in "
                f"{settings.dtype}: use --dtype float32, or another codec"
            )
        return latents

    def _add_moments(self, moments: MomentAccumulator, latents: Tensor) -> None:
        record = self._job.codec.record
        if self._job.settings.kind == "mode":
            moments.add(normalize(latents.double(), record))
            return
        mean, log_variance = latents.double().chunk(2, dim=1)
        normalized = normalize(mean, record)
        deviation = normalize(mean + (0.5 * clamp_log_variance(log_variance)).exp(), record) - normalized
        moments.add(normalized, deviation.square())

    def _write(self, planned: PlannedShard, encoded: EncodedShard) -> ShardRecord:
        text, moments = self._job.text, encoded.moments
        truncated = 0 if text is None else text.truncated
        shard = self._write_shard(planned, encoded) if encoded.samples else None
        return ShardRecord(
            shard=shard,
            rejected=tuple(encoded.rejected),
            truncated=0 if text is None else text.truncated - truncated,
            count=moments.count,
            total=float(moments.total),
            squares=float(moments.squares),
            remarks=encoded.remarks.found,
            decoding=DECODING_VERSION,
        )

    def _write_shard(self, planned: PlannedShard, encoded: EncodedShard) -> Shard:
        job, settings = self._job, self._job.settings
        folder, dtype = job.output.by_split[planned.split], STORED_DTYPES[settings.dtype].torch
        files = [job.source.files[sample.file] for sample in encoded.samples]
        latents = torch.cat(encoded.latents)
        ids = torch.tensor(
            [sample_id(file.key, one.clip, one.view) for file, one in zip(files, encoded.samples, strict=True)]
        )
        labels = torch.tensor([file.label for file in files])
        captions = [file.caption or "" for file in files]
        members: list[PackedMember] = []
        texts: list[PackedMember] = []
        for first in range(0, len(ids), settings.samples_per_member):
            part = slice(first, first + settings.samples_per_member)
            name = f"{planned.number * settings.members_per_shard + len(members):08d}.safetensors"
            members.append(PackedMember(name, len(ids[part]), pack_samples(latents[part], ids[part], labels[part])))
            if job.text is not None:
                content = pack_text(job.text.encode(captions[part]), ids[part], dtype)
                texts.append(PackedMember(name, len(ids[part]), content))
        # Captions first: a shard of latents must never exist without them.
        side_car: TarIndex | None = write_tar(folder, f"text-{planned.number:06d}.tar", texts) if texts else None
        tar = write_tar(folder, f"shard-{planned.number:06d}.tar", members)
        shape = job.codec.latent_shape(*planned.bucket)
        return Shard(**dict(tar), samples=len(ids), shape=shape, text=side_car)
