"""What an encoding job will write: which samples, in which order, in which shard, known before anything is encoded.

A plan follows from the inputs' keys, the settings and (where there are several buckets, or videos) the size of each
input; never from who encodes what, or when. So many processes can share a job, and one that is cut off can go on.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from rdm_scale import rng
from rdm_scale.encoding.inputs import MediaFile, MediaSet
from rdm_scale.errors import ConfigError, DataError

SIDES = ("train", "holdout")


class Bucket(NamedTuple):
    """A size in pixels that inputs are brought to; images have one frame."""

    frames: int
    height: int
    width: int

    @classmethod
    def parse(cls, text: str) -> "Bucket":
        """From HxW or TxHxW. Raises ConfigError."""
        try:
            sizes = [int(part) for part in text.lower().split("x")]
            if len(sizes) in (2, 3) and min(sizes) > 0:
                return cls(*([1] * (3 - len(sizes))), *sizes)
        except ValueError:
            pass
        raise ConfigError(f"{text!r} is not a size: write HEIGHTxWIDTH or FRAMESxHEIGHTxWIDTH, for instance 256x320")

    def __str__(self) -> str:
        return "x".join(map(str, self if self.frames > 1 else self[1:]))


class Probe(NamedTuple):
    """The size of an input: frames at the rate that clips are taken at."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Settings:
    """All that decides what an encoding job writes, beside its inputs and its codec."""

    buckets: tuple[Bucket, ...]
    kind: Literal["mode", "moments"] = "mode"
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    seed: int = 0
    flips: bool = False  # a mirrored second view of each sample
    fps: float | None = None  # of clips; None: the videos' own
    stride: int = 1  # frames from one of a clip to the next
    clip_step: int | None = None  # frames from the start of a clip to that of the next; None: a clip's length
    holdout_share: float = 0.0
    batch_size: int = 64
    samples_per_member: int = 64
    members_per_shard: int = 64

    def check(self, kind: str) -> None:
        """Raises ConfigError: these settings make no sense for images, or for videos."""
        if kind == "image" and (
            any(b.frames > 1 for b in self.buckets) or self.fps or self.clip_step or self.stride > 1
        ):
            raise ConfigError("the input holds images: frames, fps, stride and clip step are for videos")

    def clip_starts(self, bucket: Bucket) -> int:
        """Frames from the start of a clip to that of the next."""
        return self.clip_step or bucket.frames * self.stride

    @property
    def samples_per_shard(self) -> int:
        return self.samples_per_member * self.members_per_shard


class Item(NamedTuple):
    """A sample to be: a view (1: mirrored) of a clip of a file."""

    file: int
    clip: int
    view: int


@dataclass(frozen=True, eq=False)  # compared as objects: hashing thousands of items again and again would take seconds
class PlannedShard:
    side: Literal["train", "holdout"]
    number: int  # of its side
    bucket: Bucket
    items: tuple[Item, ...]

    def batches(self, size: int) -> Iterator[tuple[Item, ...]]:
        return (self.items[first : first + size] for first in range(0, len(self.items), size))

    def digest(self, source: MediaSet) -> str:
        """A short hash of what is to be in it."""
        content = (self.bucket, [(source.files[item.file].key, item.clip, item.view) for item in self.items])
        return hashlib.sha256(repr(content).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Plan:
    shards: tuple[PlannedShard, ...]
    unfit: dict[int, str]  # inputs from which nothing can be taken, and why
    samples: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", sum(len(shard.items) for shard in self.shards))


def inputs_digest(source: MediaSet, settings: Settings) -> str:
    """A hash of what is encoded and how, models left out: it is known before they are loaded."""
    digest = hashlib.sha256(repr((asdict(settings), source.kind, source.class_names)).encode())
    for file in source.files:
        digest.update(repr((file.key, file.label, file.caption)).encode())
    return digest.hexdigest()[:32]


def job_digest(inputs: str, **models: str) -> str:
    """A hash of everything that decides what a job writes. It begins with `inputs`, the `inputs_digest`."""
    return inputs + hashlib.sha256(repr(sorted(models.items())).encode()).hexdigest()[:32]


def needs_probes(source: MediaSet, settings: Settings) -> bool:
    """Whether a plan depends on the inputs' sizes."""
    return source.kind == "video" or len(settings.buckets) > 1


def make_plan(source: MediaSet, settings: Settings, probes: Sequence[Probe | str] | None) -> Plan:
    """The plan of a job.

    Args:
        probes: of each file its size, or why it has none; None where `needs_probes` is false.

    Raises:
        DataError: nothing can be taken from any input, or one side would be empty.
    """
    items: dict[tuple[str, Bucket], list[tuple[int, str, Item]]] = {}
    unfit: dict[int, str] = {}
    for index, file in enumerate(source.files):
        probe = Probe(1, 1, 1) if probes is None else probes[index]
        bucket = _bucket(probe, settings) if isinstance(probe, Probe) else probe
        if isinstance(bucket, str):
            unfit[index] = bucket
            continue
        side = SIDES[is_held_out(file.key, settings.seed, settings.holdout_share)]
        of_bucket = items.setdefault((side, bucket), [])
        for item in _items(index, probe, bucket, settings):  # type: ignore[arg-type]
            order = rng.key(settings.seed, "shuffle", file.key, item.clip, item.view)
            of_bucket.append((order, file.key, item))
    _check_sides(source, settings, {side for side, _ in items}, unfit)
    shards: list[PlannedShard] = []
    for side in SIDES:
        chosen = [(bucket, items[side, bucket]) for bucket in settings.buckets if (side, bucket) in items]
        shards += _shards(side, chosen, settings.samples_per_shard)
    return Plan(tuple(shards), unfit)


def is_held_out(key: str, seed: int, share: float) -> bool:
    """A function of the key alone, so that a sample never changes sides when data are added."""
    return rng.key(seed, "holdout", key) < share * 2**63


def split(files: Sequence[MediaFile], seed: int, share: float) -> tuple[list[MediaFile], list[MediaFile]]:
    """(training, held-out) files, each in an order that depends on nothing but their keys and the seed."""
    sides: tuple[list[MediaFile], list[MediaFile]] = ([], [])
    for file in sorted(files, key=lambda file: (rng.key(seed, "shuffle", file.key), file.key)):
        sides[is_held_out(file.key, seed, share)].append(file)
    return sides


def _bucket(probe: Probe, settings: Settings) -> Bucket | str:
    """Where an input belongs: the longest clips that it has, then the nearest aspect, then the most pixels that it
    fills. Text: why nowhere."""
    long_enough = [bucket for bucket in settings.buckets if _span(bucket, settings) <= probe.frames]
    if not long_enough:
        shortest = min(_span(bucket, settings) for bucket in settings.buckets)
        return f"it has {probe.frames} frames at the frame rate of the clips, and a clip takes {shortest}"
    if len(long_enough) == 1:
        return long_enough[0]
    aspect = math.log(probe.height / probe.width)

    def misfit(bucket: Bucket) -> tuple[int, float, bool, int]:
        enlarged = bucket.height > probe.height or bucket.width > probe.width
        pixels = bucket.height * bucket.width
        return (
            -bucket.frames,
            round(abs(math.log(bucket.height / bucket.width) - aspect), 6),
            enlarged,
            pixels if enlarged else -pixels,
        )

    return min(long_enough, key=misfit)


def _span(bucket: Bucket, settings: Settings) -> int:
    """Frames from a clip's first to its last, both counted."""
    return (bucket.frames - 1) * settings.stride + 1


def _items(index: int, probe: Probe, bucket: Bucket, settings: Settings) -> Iterator[Item]:
    last = probe.frames - _span(bucket, settings)
    for clip in range(last // settings.clip_starts(bucket) + 1):
        yield Item(index, clip, 0)
        if settings.flips:
            yield Item(index, clip, 1)


def _check_sides(source: MediaSet, settings: Settings, filled: set[str], unfit: dict[int, str]) -> None:
    if not filled:
        index, reason = next(iter(unfit.items()))
        raise DataError(f"none of the {len(source.files)} inputs can be encoded; {source.files[index].name}: {reason}")
    if settings.holdout_share and len(filled) < 2:
        empty = next(side for side in SIDES if side not in filled)
        raise DataError(
            f"a share of {settings.holdout_share} of {len(source.files)} inputs leaves the {empty} side empty: "
            "change the share or add inputs"
        )


def _shards(
    side: Any, buckets: Sequence[tuple[Bucket, list[tuple[int, str, Item]]]], size: int
) -> Iterator[PlannedShard]:
    number = 0
    for bucket, keyed in buckets:
        ordered = [item for _, _, item in sorted(keyed)]
        for first in range(0, len(ordered), size):
            yield PlannedShard(side, number, bucket, tuple(ordered[first : first + size]))
            number += 1
