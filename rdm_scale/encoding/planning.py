"""Encoding plans: the samples of a job, their order and their shards, fixed before anything is encoded.

A plan is a function of the inputs' keys, the settings and (with several buckets, or videos) the size of each input. It
does not depend on which process encodes a sample, or when, so processes can share a job and resume an interrupted one.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields
from typing import Any, Literal, NamedTuple

from rdm_scale import rng
from rdm_scale.codecs.record import CodecRecord
from rdm_scale.encoding.inputs import MediaFile, MediaSet
from rdm_scale.encoding.media import MediaKind
from rdm_scale.encoding.rejections import Rejection
from rdm_scale.encoding.text import TextEncoderRecord
from rdm_scale.errors import ConfigError, DataError

Split = Literal["train", "holdout"]
SPLITS: tuple[Split, Split] = ("train", "holdout")


class PixelBucket(NamedTuple):
    """Size that inputs are cropped and resized to, in frames and pixels; images have one frame."""

    frames: int
    height: int
    width: int

    @classmethod
    def parse(cls, text: str) -> "PixelBucket":
        """Parse HxW or TxHxW. Raises ConfigError."""
        try:
            sizes = [int(part) for part in text.lower().split("x")]
            if len(sizes) in (2, 3) and min(sizes) > 0:
                return cls(*([1] * (3 - len(sizes))), *sizes)
        except ValueError:
            pass
        raise ConfigError(f"{text!r} is not a size: write HEIGHTxWIDTH or FRAMESxHEIGHTxWIDTH, for instance 256x320")

    def __repr__(self) -> str:
        # Part of the digests of jobs and shards: another text would orphan jobs begun by earlier versions.
        return f"Bucket(frames={self.frames}, height={self.height}, width={self.width})"

    def __str__(self) -> str:
        return "x".join(map(str, self if self.frames > 1 else self[1:]))


class MediaMetadata(NamedTuple):
    """Size of an image or video; an image has one frame."""

    frames: int  # at the frame rate of the clips
    height: int
    width: int


@dataclass(frozen=True)
class EncodingSettings:
    """Everything that determines the output of a job, besides its inputs and models.

    Digests of jobs contain the names and values of all fields: renaming one would orphan the jobs of earlier
    versions.
    """

    buckets: tuple[PixelBucket, ...]
    kind: Literal["mode", "moments"] = "mode"
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    seed: int = 0
    flips: bool = False  # a mirrored second view of each sample
    fps: float | None = None  # of clips; None: the video's own
    stride: int = 1  # frames from one frame of a clip to the next
    clip_step: int | None = None  # frames from the start of a clip to that of the next; None: a clip's length
    holdout_share: float = 0.0
    batch_size: int = 64
    samples_per_member: int = 64
    members_per_shard: int = 64
    min_size: int | None = None  # pixels of the shorter side, below which an input is left out

    def described(self) -> dict[str, Any]:
        """Values of all fields for digests, without those that earlier versions did not have, if they are not used."""
        values = asdict(self)
        if self.min_size is None:
            del values["min_size"]
        return values

    def check(self, kind: MediaKind) -> None:
        """Raise ConfigError if there are settings for videos and the inputs are images."""
        if kind == "image" and (
            any(b.frames > 1 for b in self.buckets) or self.fps or self.clip_step or self.stride > 1
        ):
            raise ConfigError(
                "the input consists of images: leave out frames, fps, stride and clip step, which are for videos"
            )

    def clip_interval(self, bucket: PixelBucket) -> int:
        """Frames from the start of a clip to that of the next."""
        return self.clip_step or bucket.frames * self.stride

    def clip_span(self, bucket: PixelBucket) -> int:
        """Frames from the first to the last of a clip, both included."""
        return (bucket.frames - 1) * self.stride + 1

    @property
    def samples_per_shard(self) -> int:
        return self.samples_per_member * self.members_per_shard


class PlannedSample(NamedTuple):
    """A view of a clip of an input file."""

    file: int  # index into MediaSet.files
    clip: int  # 0 for images
    view: int  # 1: mirrored


@dataclass(frozen=True, eq=False)  # compared by identity: hashing all samples would be slow
class PlannedShard:
    """The samples of one latent shard, in their order, all of one bucket."""

    split: Split
    number: int  # counted within its split
    bucket: PixelBucket
    samples: tuple[PlannedSample, ...]

    def batches(self, size: int) -> Iterator[tuple[PlannedSample, ...]]:
        return (self.samples[first : first + size] for first in range(0, len(self.samples), size))

    def digest(self, source: MediaSet) -> str:
        """Short hash of the bucket and the samples."""
        content = (self.bucket, [(source.files[one.file].key, one.clip, one.view) for one in self.samples])
        return hashlib.sha256(repr(content).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class EncodingPlan:
    """Shards of a job, and inputs that cannot be encoded."""

    shards: tuple[PlannedShard, ...]
    rejected: dict[int, Rejection]  # by index of the input
    sample_count: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_count", sum(len(shard.samples) for shard in self.shards))


def inputs_digest(source: MediaSet, settings: EncodingSettings) -> str:
    """Hash of the inputs and the settings, without the models, which need not be loaded yet."""
    digest = hashlib.sha256(repr((settings.described(), source.kind, source.class_names)).encode())
    for file in source.files:
        content: tuple[object, ...] = (file.key, file.label, file.caption)
        if settings.holdout_share and file.source != file.key:  # earlier versions split by keys alone
            content += (file.source,)
        digest.update(repr(content).encode())
    return digest.hexdigest()[:32]


def job_digest(inputs: str, codec: CodecRecord, text: TextEncoderRecord | None) -> str:
    """Hash of everything that determines the output of a job.

    Args:
        inputs: the `inputs_digest`; the result begins with it.
        text: None if captions are not encoded.
    """
    described = None
    if text is not None:  # spelled out: the digests of earlier versions contain an old name of the class
        values = zip(fields(text), astuple(text), strict=True)
        described = f"TextRecord({', '.join(f'{one.name}={value!r}' for one, value in values)})"
    models = [("codec", codec.model_dump_json()), ("text", str(described))]
    return inputs + hashlib.sha256(repr(models).encode()).hexdigest()[:32]


def needs_metadata(source: MediaSet, settings: EncodingSettings) -> bool:
    """True if a plan depends on the sizes of the inputs."""
    return source.kind == "video" or len(settings.buckets) > 1


def make_plan(
    source: MediaSet, settings: EncodingSettings, metadata: Sequence[MediaMetadata | Rejection] | None
) -> EncodingPlan:
    """Plan the shards of a job.

    Args:
        metadata: size of each input file, or the reason why it cannot be read; None unless `needs_metadata`.

    Raises:
        DataError: no input can be encoded, or one split would be empty.
    """
    keyed: dict[tuple[Split, PixelBucket], list[_Keyed]] = {}
    rejected: dict[int, Rejection] = {}
    for index, file in enumerate(source.files):
        size = MediaMetadata(1, 1, 1) if metadata is None else metadata[index]
        if isinstance(size, Rejection):
            rejected[index] = size
            continue
        if metadata is not None and (small := too_small(file.name, size.height, size.width, settings.min_size)):
            rejected[index] = Rejection(small, "size")
            continue
        bucket = _choose_bucket(size, settings)
        if bucket is None:
            shortest = min(map(settings.clip_span, settings.buckets))
            rejected[index] = Rejection(
                f"{file.name} has {size.frames} frames at the frame rate of the clips, and a clip takes {shortest}"
            )
            continue
        split = SPLITS[is_held_out(file.source, settings.seed, settings.holdout_share)]
        of_bucket = keyed.setdefault((split, bucket), [])
        for sample in _samples(index, size, bucket, settings):
            order = rng.key(settings.seed, "shuffle", file.key, sample.clip, sample.view)
            of_bucket.append(_Keyed(order, file.key, sample))
    _check_splits(source, settings, {split for split, _ in keyed}, rejected)
    shards: list[PlannedShard] = []
    for split in SPLITS:
        number = 0
        for bucket in settings.buckets:
            ordered = [one.sample for one in sorted(keyed.get((split, bucket), []))]
            for first in range(0, len(ordered), settings.samples_per_shard):
                samples = tuple(ordered[first : first + settings.samples_per_shard])
                shards.append(PlannedShard(split, number, bucket, samples))
                number += 1
    return EncodingPlan(tuple(shards), rejected)


def too_small(name: str, height: int, width: int, min_size: int | None) -> str | None:
    """Reason to leave out an input whose shorter side is less than `min_size` pixels; None if it is large enough."""
    if min_size is None or min(height, width) >= min_size:
        return None
    return f"{name} has {height} x {width} pixels, less than the minimum size {min_size}"


class _Keyed(NamedTuple):
    """A sample and its sort key."""

    order: int
    key: str
    sample: PlannedSample


def is_held_out(source: str, seed: int, share: float) -> bool:
    """True if the samples of this source, see `MediaFile.source`, are in the holdout.

    It depends on the source and the seed alone, so that a sample never changes splits when data is added.
    """
    return rng.key(seed, "holdout", source) < share * 2**63


class FileSplits(NamedTuple):
    """Files of the training set and of the held-out set."""

    train: list[MediaFile]
    holdout: list[MediaFile]


def split_files(files: Sequence[MediaFile], seed: int, holdout_share: float) -> FileSplits:
    """Shuffle files and split off the holdout; order and split depend on the keys and the seed alone."""
    splits = FileSplits([], [])
    for file in sorted(files, key=lambda file: (rng.key(seed, "shuffle", file.key), file.key)):
        splits[is_held_out(file.source, seed, holdout_share)].append(file)
    return splits


def _choose_bucket(size: MediaMetadata, settings: EncodingSettings) -> PixelBucket | None:
    """Bucket that an input is assigned to; None if the input is too short for all of them.

    The longest clip is preferred, then the nearest aspect ratio, then the most pixels without enlarging the input.
    """
    long_enough = [bucket for bucket in settings.buckets if settings.clip_span(bucket) <= size.frames]
    if len(long_enough) <= 1:
        return long_enough[0] if long_enough else None
    aspect = math.log(size.height / size.width)

    def rank(bucket: PixelBucket) -> tuple[int, float, bool, int]:
        enlarged = bucket.height > size.height or bucket.width > size.width
        pixels = bucket.height * bucket.width
        return (
            -bucket.frames,
            round(abs(math.log(bucket.height / bucket.width) - aspect), 6),
            enlarged,
            pixels if enlarged else -pixels,
        )

    return min(long_enough, key=rank)


def _samples(
    file: int, size: MediaMetadata, bucket: PixelBucket, settings: EncodingSettings
) -> Iterator[PlannedSample]:
    last = size.frames - settings.clip_span(bucket)
    for clip in range(last // settings.clip_interval(bucket) + 1):
        yield PlannedSample(file, clip, 0)
        if settings.flips:
            yield PlannedSample(file, clip, 1)


def _check_splits(
    source: MediaSet, settings: EncodingSettings, filled: set[Split], rejected: Mapping[int, Rejection]
) -> None:
    if not filled:
        first = next(iter(rejected.values()))
        raise DataError(f"none of the {len(source.files)} inputs can be encoded. The first: {first.reason}")
    if settings.holdout_share and len(filled) < 2:
        empty = next(split for split in SPLITS if split not in filled)
        raise DataError(
            f"a share of {settings.holdout_share} of {len(source.files)} inputs leaves the {empty} split empty: "
            "change the share or add inputs"
        )
