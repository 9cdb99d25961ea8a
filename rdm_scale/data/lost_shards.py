"""Shards that proved unreadable, within the budget that a configuration allows, and what stands in for them.

A lost shard keeps its place in the order of samples, and every sample of it is replaced by one of another shard of its
set and shape: the same for every rank that knows of the loss, and a run for a run, so that reading stays
sequential. Nothing is lost in silence: each loss is told once, counted, and kept in checkpoints.
"""

from collections.abc import Sequence

from rdm_scale import rng
from rdm_scale.data.manifest import Manifest
from rdm_scale.data.order import Run
from rdm_scale.errors import DataError


class LostShards:
    """The lost shards of a run's sets, as far as this rank knows.

    Args:
        budget: how many shards may be lost.
        known: those lost before, as `known` lists them. One that is no longer part of the sets is forgotten.
    """

    def __init__(
        self, manifests: Sequence[Manifest], budget: int, seed: int, known: Sequence[Sequence[str]] = ()
    ) -> None:
        self._manifests, self._budget, self._seed = manifests, budget, seed
        self._lost: set[tuple[int, int]] = set()  # set, shard
        self._untold: list[str] = []
        self.merge(known)
        self._untold.clear()

    def __len__(self) -> int:
        return len(self._lost)

    @property
    def samples(self) -> int:
        """Samples in lost shards."""
        return sum(self._manifests[s].shards[shard].samples for s, shard in tuple(self._lost))

    @property
    def known(self) -> list[list[str]]:
        """(digest of the set's manifest, name of the shard) of each."""
        named = ((self._manifests[s].digest, self._manifests[s].shards[shard].name) for s, shard in tuple(self._lost))
        return sorted(map(list, named))

    def mark_lost(self, which: int, shard: int, reason: DataError) -> None:
        """Takes a shard for lost. Raises `reason` where there is no budget for any, DataError where it is spent."""
        if self._budget == 0:
            raise reason
        if (which, shard) in self._lost:
            return
        self._lost.add((which, shard))
        self._check_budget(reason)
        self._untold.append(f"lost {self._manifests[which].shards[shard].name}: {reason}")

    def merge(self, known: Sequence[Sequence[str]]) -> None:
        """Takes for lost what another rank, or an earlier run, has found to be lost. Raises DataError: too many."""
        names = {(digest, name) for digest, name in known}
        for s, manifest in enumerate(self._manifests) if names else ():
            self._lost |= {(s, i) for i, shard in enumerate(manifest.shards) if (manifest.digest, shard.name) in names}
        self._check_budget(DataError(f"unreadable are {', '.join(sorted(name for _, name in names))}"))

    def take_warnings(self) -> list[str]:
        """What this rank has lost since the last call, each with its reason."""
        untold, self._untold = self._untold, []
        return untold

    def substitute(self, run: Run) -> Run:
        """The run itself where its shard is whole; where it is lost, one of another shard, perhaps of other size."""
        if (run.set, run.shard) not in self._lost:
            return run
        manifest = self._manifests[run.set]
        shape = manifest.shape_of(manifest.shards[run.shard])
        whole = [index for index in manifest.buckets[shape] if (run.set, index) not in self._lost]
        if not whole:
            raise DataError(f"all shards with latents {list(shape)} are lost, {manifest.shards[run.shard].name} too")
        shard = whole[rng.key(self._seed, "stand-in", run.shard) % len(whole)]
        members = manifest.shards[shard].members
        first = run.first % len(members)
        return Run(run.set, shard, first, min(first + run.end - run.first, len(members)))

    def _check_budget(self, reason: DataError) -> None:
        if len(self._lost) > self._budget:
            raise DataError(f"{len(self._lost)} shards are lost and data.lost_shards={self._budget}: {reason}")
