"""Loading of segments: those that the rows of the batches are at stay in memory; lost shards are substituted."""

from collections.abc import Sequence

from rdm_scale.data.batch_plan import Bucket
from rdm_scale.data.contiguous_reader import ContiguousReader, UnreadableError
from rdm_scale.data.loaded_samples import LoadedSamples
from rdm_scale.data.lost_shards import LostShards
from rdm_scale.data.order import ContiguousRead, RowSegment


class SegmentLoader:
    """Loader of the segments of planned batches.

    It keeps the segments of the last batch of each bucket: the next batch of the bucket needs most of them again.

    Args:
        lost_shards: shards to substitute; unreadable ones are added, within the budget.
    """

    def __init__(self, reader: ContiguousReader, lost_shards: LostShards) -> None:
        self._reader, self._lost_shards = reader, lost_shards
        self._in_use: dict[Bucket, dict[RowSegment, LoadedSamples]] = {}
        self._lost_when_loaded = len(lost_shards)

    @property
    def has_room(self) -> bool:
        """True if more segments can be prefetched."""
        return self._reader.has_room

    def prefetch(self, bucket: Bucket, segments: Sequence[RowSegment]) -> None:
        """Start reading the segments that are not in use, as long as there is room."""
        in_use = self._in_use.get(bucket, {})
        self._reader.prefetch(self._substitute(segment) for segment in segments if segment not in in_use)

    def load(self, bucket: Bucket, segments: Sequence[RowSegment]) -> list[LoadedSamples]:
        """Load the samples of the segments of a batch, one entry per segment.

        Raises:
            DataError: a shard cannot be read, and the budget of lost shards is used up.
        """
        while True:
            if len(self._lost_shards) != self._lost_when_loaded:
                # Every rank reads substitutes from the same step on, also for segments that are in use.
                self._in_use.clear()
                self._lost_when_loaded = len(self._lost_shards)
            try:
                loaded = self._in_use[bucket] = self._load(self._in_use.get(bucket, {}), segments)
                return [loaded[segment] for segment in segments]
            except UnreadableError as error:
                self._lost_shards.mark_lost(error.dataset, error.shard, error.reason)

    def _load(
        self, in_use: dict[RowSegment, LoadedSamples], segments: Sequence[RowSegment]
    ) -> dict[RowSegment, LoadedSamples]:
        added = list(dict.fromkeys(segment for segment in segments if segment not in in_use))
        if not added:
            return in_use
        needed = set(segments)
        self._reader.release(self._substitute(segment) for segment in in_use if segment not in needed)
        loaded = self._reader.get([self._substitute(segment) for segment in added])
        kept = {segment: samples for segment, samples in in_use.items() if segment in needed}
        return kept | {segment: samples.take(segment.samples) for segment, samples in zip(added, loaded, strict=True)}

    def _substitute(self, segment: RowSegment) -> ContiguousRead:
        return self._lost_shards.substitute(segment.read)
