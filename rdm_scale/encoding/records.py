"""Records of finished shards: one small JSON file each, in a folder shared by all ranks and later runs of a job."""

import re
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from rdm_scale.data.manifest import Shard
from rdm_scale.encoding.inputs import MediaSet
from rdm_scale.encoding.planning import EncodingPlan, PlannedShard
from rdm_scale.encoding.rejections import RejectionCause
from rdm_scale.encoding.remarks import Remark
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location

_RECORD = re.compile(r"(train|holdout)-\d+-.*")  # also of a process that was killed while it wrote one


class RejectedSample(NamedTuple):
    """A sample that could not be decoded."""

    position: int  # in PlannedShard.samples
    reason: str
    cause: RejectionCause = "content"  # earlier versions did not distinguish


class ShardRecord(BaseModel):
    """Result of a planned shard. The fields are a file format: jobs begun by earlier versions are resumed from it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shard: Shard | None  # None: no sample could be decoded
    rejected: tuple[RejectedSample, ...]
    truncated: int  # number of captions that were truncated
    count: int  # number of elements of the normalized latents
    total: float  # their sum
    squares: float  # sum of their squares
    remarks: dict[str, Remark] = {}
    decoding: int = 1  # DECODING_VERSION of the samples; earlier versions do not state it


class RecordStore:
    """Records of a plan's shards. Every method raises OSError if the folder cannot be read or written."""

    def __init__(self, folder: Location, plan: EncodingPlan, source: MediaSet) -> None:
        self._folder = folder
        # The digest in the name tells the records of this plan from those of another.
        self._names = {s: f"{s.split}-{s.number:06d}-{s.digest(source)}.json" for s in plan.shards}

    def finished(self) -> set[PlannedShard]:
        """The shards that any rank has recorded."""
        present = self._folder.stats()
        return {shard for shard, name in self._names.items() if name in present}

    def write(self, shard: PlannedShard, record: ShardRecord) -> None:
        (self._folder / self._names[shard]).write(record.model_dump_json().encode())

    def read(self, shard: PlannedShard) -> ShardRecord:
        """Read the record of a finished shard. A damaged one is removed, and DataError raised."""
        file = self._folder / self._names[shard]
        try:
            return ShardRecord.model_validate_json(file.read())
        except ValidationError:
            file.remove()
            raise DataError(f"{file} is damaged and was removed: run the same command again") from None

    def remove(self, shard: PlannedShard) -> None:
        """Remove a record, so that the shard is encoded again."""
        (self._folder / self._names[shard]).remove()

    def remove_others(self) -> None:
        """Remove the records of other plans: their shards will be overwritten or removed."""
        for name in self._folder.stats().keys() - set(self._names.values()):
            if _RECORD.fullmatch(name):
                (self._folder / name).remove()
