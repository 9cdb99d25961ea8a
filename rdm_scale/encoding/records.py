"""What became of the shards of a plan: a small file for each that is done, in a folder that ranks and repeats share."""

from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from rdm_scale.data.manifest import Shard
from rdm_scale.encoding.inputs import MediaSet
from rdm_scale.encoding.planning import Plan, PlannedShard
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location


class Rejected(NamedTuple):
    """A sample that could not be decoded."""

    item: int  # index in its planned shard
    reason: str


class Record(BaseModel):
    """What became of a planned shard; `shard` is None when none of its samples could be decoded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shard: Shard | None
    rejected: tuple[Rejected, ...]
    truncated: int  # captions that were cut
    count: int  # elements of the normalized latents, their sum, and that of their squares
    total: float
    squares: float


class Records:
    """The records of a plan's shards. All methods raise OSError: the folder cannot be read or written."""

    def __init__(self, folder: Location, plan: Plan, source: MediaSet) -> None:
        self._folder = folder
        # Tied to what a shard is planned to hold: a record of another plan is never taken for one of this.
        self._names = {s: f"{s.side}-{s.number:06d}-{s.digest(source)}.json" for s in plan.shards}

    def done(self) -> set[PlannedShard]:
        """The shards that are recorded, by whomever."""
        present = self._folder.stats()
        return {shard for shard, name in self._names.items() if name in present}

    def write(self, shard: PlannedShard, record: Record) -> None:
        (self._folder / self._names[shard]).write(record.model_dump_json().encode())

    def read(self, shard: PlannedShard) -> Record:
        """Raises DataError: it is damaged."""
        place = self._folder / self._names[shard]
        try:
            return Record.model_validate_json(place.read())
        except ValidationError:
            place.remove()
            raise DataError(f"{place} is damaged and was removed: run the same command again") from None

    def forget(self, shard: PlannedShard) -> None:
        (self._folder / self._names[shard]).remove()

    def forget_others(self) -> None:
        """Removes the records of other plans: their shards are written over, or will be removed."""
        for name in self._folder.stats().keys() - set(self._names.values()):
            (self._folder / name).remove()
