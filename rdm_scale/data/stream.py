"""Latents in batches: the endless stream of training, and the held-out set of validation."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from rdm_scale import rng
from rdm_scale.data.codecs import normalise
from rdm_scale.data.manifest import Manifest, read_manifest
from rdm_scale.data.order import GlobalOrder, Place
from rdm_scale.data.shards import read_member
from rdm_scale.data.storage import Location
from rdm_scale.errors import ConfigError, DataError

_CACHE_BYTES = 2**28


@dataclass(frozen=True)
class LatentBatch:
    """The share of one rank of the samples of a step, normalised to unit scale.

    positions, ids and labels int64 [B] (label -1: unlabelled); latents float32 [B, C, T, H, W].
    """

    step: int
    positions: Tensor
    ids: Tensor
    labels: Tensor
    latents: Tensor


class LatentStream:
    """The samples of a manifest in their global order, without end; every one once an epoch over all ranks.

    Iterating yields this rank's batches of steps start_step + 1, + 2, ...; the global batch of a step is the same for
    every dp_size. Moments are sampled with noise that belongs to (seed, position).

    Args:
        manifest_url: of the manifest, or the folder that it is in; any fsspec location.
        start_step: the last step that is done already.

    Raises:
        ConfigError: dp_size does not divide global_batch_size, or there is no such dp_rank.
        DataError: the manifest or a shard is missing or damaged; shards also while iterating.
    """

    def __init__(
        self,
        manifest_url: str,
        *,
        global_batch_size: int,
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        start_step: int = 0,
    ) -> None:
        _check_ranks(dp_rank, dp_size)
        if global_batch_size < 1 or global_batch_size % dp_size:
            raise ConfigError(
                f"train.global_batch_size={global_batch_size} cannot be shared by {dp_size} data-parallel ranks: "
                f"use a multiple of {dp_size}"
            )
        self.manifest, folder = open_shards(manifest_url)
        self.seed, self.dp_rank, self.dp_size, self.start_step = seed, dp_rank, dp_size, start_step
        self._order = GlobalOrder(self.manifest, seed=seed, streams=global_batch_size)
        self._reader = _Reader(self.manifest, folder, streams=global_batch_size // dp_size)

    def __iter__(self) -> Iterator[LatentBatch]:
        return (self.batch(step) for step in count(self.start_step + 1))

    def batch(self, step: int) -> LatentBatch:
        """This rank's share of the batch of a step (from 1), whatever was read before."""
        positions = self._order.positions(step, self.dp_rank, self.dp_size)
        return self._reader.batch(step, positions, self._order.places(positions), self.seed, "posterior")


class HeldOut:
    """The first samples of a manifest, in its order, for validation: each once over all ranks.

    Iterating yields (batch, weights [B] float64). Every rank gets the same number of batches of the same size, as
    collectives need; what the set lacks to fill them is its last sample again, with weight 0. A sample's position is
    its index in the set. Moments are sampled with noise that belongs to the position alone, not to a run's seed, so
    that runs can be compared.

    Args:
        samples: size of the set, at most; attribute `samples` is how many there are.
        batch_size: samples in a batch of one rank.

    Raises:
        ConfigError: an impossible size or rank.
        DataError: as `LatentStream`.
    """

    def __init__(self, manifest_url: str, samples: int, *, batch_size: int, dp_rank: int = 0, dp_size: int = 1) -> None:
        _check_ranks(dp_rank, dp_size)
        if samples < 1 or batch_size < 1:
            raise ConfigError(f"a held-out set of {samples} samples in batches of {batch_size}: use at least 1")
        self.manifest, folder = open_shards(manifest_url)
        self.samples = min(samples, self.manifest.samples)
        self.batch_size, self.dp_rank, self.dp_size = batch_size, dp_rank, dp_size
        self._reader = _Reader(self.manifest, folder, streams=1)

    def __len__(self) -> int:
        return -(-self.samples // (self.batch_size * self.dp_size))

    def __iter__(self) -> Iterator[tuple[LatentBatch, Tensor]]:
        places = _in_order(self.manifest)
        read: list[Place] = []  # places up to where this rank has come
        for number in range(len(self)):
            first = (number * self.dp_size + self.dp_rank) * self.batch_size
            indices = range(first, first + self.batch_size)
            positions = [min(i, self.samples - 1) for i in indices]
            while len(read) <= positions[-1]:
                read.append(next(places))
            batch = self._reader.batch(number + 1, positions, [read[p] for p in positions], 0, "held-out posterior")
            yield batch, torch.tensor([float(i < self.samples) for i in indices], dtype=torch.float64)


def open_shards(manifest_url: str) -> tuple[Manifest, Location]:
    """The manifest and its folder, in which every shard has the size that the manifest says.

    Raises:
        DataError: naming the manifest's fault, or the first shard that is missing or has another size.
    """
    manifest, folder = read_manifest(manifest_url)
    for shard in manifest.shards:
        place = folder / shard.name
        try:
            found = place.size()
        except FileNotFoundError:
            raise DataError(f"{place} is missing, and the manifest lists it: copy or encode the data again") from None
        except OSError as error:
            raise DataError(f"cannot read {place}: {error}") from None
        if found != shard.bytes:
            raise DataError(
                f"{place} has {found} bytes, the manifest says {shard.bytes}: copy or encode the data again"
            )
    return manifest, folder


class _Samples(NamedTuple):
    """A member, taken apart so that one of its samples costs nothing to look up."""

    latents: Sequence[Tensor]
    ids: list[int]
    labels: list[int]


class _Reader:
    """Turns places into batches, and keeps members that are still in use: `streams` of them at least."""

    def __init__(self, manifest: Manifest, folder: Location, streams: int) -> None:
        self.manifest, self.folder = manifest, folder
        largest = max(member.bytes for shard in manifest.shards for member in shard.members)
        self._bound = max(_CACHE_BYTES, streams * largest)  # with less, streams would drive out each other's members
        self._bytes = 0
        self._members: OrderedDict[tuple[int, int], _Samples] = OrderedDict()

    def batch(
        self, step: int, positions: Sequence[int], places: Sequence[Place], seed: int, purpose: str
    ) -> LatentBatch:
        found = [(self._member(shard, member), sample) for shard, member, sample in places]
        raw = torch.stack([member.latents[sample] for member, sample in found]).float()
        if self.manifest.kind == "moments":
            shape = self.manifest.shape
            noise = [torch.randn(shape, generator=rng.generator(seed, purpose, position)) for position in positions]
            raw = posterior_sample(raw, torch.stack(noise))
        return LatentBatch(
            step=step,
            positions=torch.tensor(positions),
            ids=torch.tensor([member.ids[sample] for member, sample in found]),
            labels=torch.tensor([member.labels[sample] for member, sample in found]),
            latents=normalise(raw, self.manifest.codec),
        )

    def _member(self, shard: int, member: int) -> _Samples:
        key = shard, member
        if key not in self._members:
            tensors = read_member(self.folder, self.manifest, shard, member)
            ids, labels = tensors["ids"].tolist(), tensors["labels"].tolist()
            self._members[key] = _Samples(tensors["latents"].unbind(), ids, labels)
            self._bytes += self._size(key)
        self._members.move_to_end(key)
        while self._bytes > self._bound:
            oldest, _ = self._members.popitem(last=False)
            self._bytes -= self._size(oldest)
        return self._members[key]

    def _size(self, key: tuple[int, int]) -> int:
        shard, member = key
        return self.manifest.shards[shard].members[member].bytes


def posterior_sample(moments: Tensor, noise: Tensor) -> Tensor:
    """A draw from the posterior: moments [B, 2C, T, H, W] and noise [B, C, T, H, W] to raw latents [B, C, T, H, W].

    The log-variance is clamped as in latent diffusion (Rombach et al. 2022) and diffusers.
    """
    mean, log_variance = moments.chunk(2, dim=1)
    return mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise


def _in_order(manifest: Manifest) -> Iterator[Place]:
    for s, shard in enumerate(manifest.shards):
        for m, member in enumerate(shard.members):
            yield from (Place(s, m, sample) for sample in range(member.samples))


def _check_ranks(dp_rank: int, dp_size: int) -> None:
    if not 0 <= dp_rank < dp_size:
        raise ConfigError(f"there is no data-parallel rank {dp_rank} of {dp_size}")
