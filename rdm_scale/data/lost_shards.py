"""Shards that turned out to be unreadable, up to a configured budget, and the shards that substitute for them.

A lost shard keeps its place in the global order, and each contiguous read of it is replaced by a read of a substitute
shard of the same data set and shape. All ranks that know of the loss choose the same substitute. Each loss is
reported once, counted in the metrics, and kept in checkpoints.
"""

from collections.abc import Sequence
from typing import NamedTuple

from rdm_scale import rng
from rdm_scale.data.manifest import Manifest
from rdm_scale.data.order import ContiguousRead
from rdm_scale.errors import DataError


class _ShardIndex(NamedTuple):
    dataset: int
    shard: int


class LostShards:
    """The lost shards of a run's data sets, as far as this rank knows.

    Args:
        manifests: manifests of the data sets, in the order of their indices.
        budget: number of shards that may be lost.
        known: shards lost earlier, in the format of the attribute `known`; shards of other manifests are ignored.

    Raises:
        DataError: more shards of `known` are lost than the budget allows.
    """

    def __init__(
        self, manifests: Sequence[Manifest], budget: int, seed: int, known: Sequence[Sequence[str]] = ()
    ) -> None:
        self._manifests, self._budget, self._seed = manifests, budget, seed
        self._lost: set[_ShardIndex] = set()
        self._pending_warnings: list[str] = []
        self.merge(known)

    def __len__(self) -> int:
        """Number of lost shards."""
        return len(self._lost)

    @property
    def samples(self) -> int:
        """Number of samples in lost shards."""
        return sum(self._manifests[dataset].shards[shard].samples for dataset, shard in tuple(self._lost))

    @property
    def known(self) -> list[list[str]]:
        """[digest of the manifest, name of the shard] of each lost shard, sorted."""
        manifests = self._manifests
        return sorted([manifests[d].digest, manifests[d].shards[shard].name] for d, shard in tuple(self._lost))

    def mark_lost(self, dataset: int, shard: int, reason: DataError) -> None:
        """Record a shard as lost and add a pending warning.

        Raises:
            DataError: `reason` itself if the budget is 0; a message that contains it if the budget is exceeded.
        """
        if self._budget == 0:
            raise reason
        if (dataset, shard) in self._lost:
            return
        self._lost.add(_ShardIndex(dataset, shard))
        self._check_budget(reason)
        self._pending_warnings.append(f"lost {self._manifests[dataset].shards[shard].name}: {reason}")

    def merge(self, known: Sequence[Sequence[str]]) -> None:
        """Add the lost shards of another rank or an earlier run, without a warning.

        Raises:
            DataError: more shards are lost than the budget allows.
        """
        names = {(digest, name) for digest, name in known}
        for d, manifest in enumerate(self._manifests) if names else ():
            lost = (i for i, shard in enumerate(manifest.shards) if (manifest.digest, shard.name) in names)
            self._lost |= {_ShardIndex(d, i) for i in lost}
        self._check_budget(DataError(f"unreadable: {', '.join(sorted(name for _, name in names))}"))

    def take_warnings(self) -> list[str]:
        """Return one line per shard that this rank has lost since the last call, with the reason."""
        warnings, self._pending_warnings = self._pending_warnings, []
        return warnings

    def substitute(self, read: ContiguousRead) -> ContiguousRead:
        """The read itself, or if its shard is lost a read of the substitute shard, possibly of fewer samples.

        Raises:
            DataError: every shard of the same data set and shape is lost.
        """
        if (read.dataset, read.shard) not in self._lost:
            return read
        manifest = self._manifests[read.dataset]
        shape = manifest.shape_of(manifest.shards[read.shard])
        readable = [index for index in manifest.buckets[shape] if (read.dataset, index) not in self._lost]
        if not readable:
            raise DataError(
                f"all shards with latents of shape {list(shape)} are lost, {manifest.shards[read.shard].name} among "
                "them: restore one of them, or encode the data again"
            )
        shard = readable[rng.key(self._seed, "stand-in", read.shard) % len(readable)]
        members = manifest.shards[shard].members
        first = read.first % len(members)
        return ContiguousRead(read.dataset, shard, first, min(first + read.end - read.first, len(members)))

    def _check_budget(self, reason: DataError) -> None:
        if len(self._lost) > self._budget:
            raise DataError(f"{len(self._lost)} shards are lost, more than data.lost_shards={self._budget}: {reason}")
