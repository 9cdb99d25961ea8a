"""The shared plan of a job: what rank 0 finds out once for all ranks and later runs."""

import json
from typing import NamedTuple

from rdm_scale.encoding.planning import MediaMetadata
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location

_NAME = "plan.json"


class SharedPlan(NamedTuple):
    """Content of `plan.json`, which is kept in the working folder until the job is done."""

    digest: str  # of the job
    threads: int  # of a CPU codec; another number would change the last bits of latents
    metadata: list[MediaMetadata | str] | None  # size of each input, or why it cannot be read; None: not needed

    def write(self, work: Location) -> None:
        # A file format: the keys are those of earlier versions.
        content = {"job": self.digest, "threads": self.threads, "probes": self.metadata}
        (work / _NAME).write(json.dumps(content).encode())

    @staticmethod
    def exists(work: Location) -> bool:
        return (work / _NAME).exists()

    @staticmethod
    def remove(work: Location) -> None:
        """Remove it, so that the next run reads the metadata of the inputs again."""
        (work / _NAME).remove()

    @classmethod
    def read(cls, work: Location, digest: str) -> "SharedPlan":
        """Read the plan of the job whose digest is `digest`, or begins with it.

        Raises:
            FileNotFoundError: there is no plan (yet).
            DataError: the plan is damaged, or belongs to another job.
        """
        file = work / _NAME
        content = file.read()
        try:
            found = cls._parse(content)
            same = found.digest.startswith(digest)
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise DataError(f"{file} is damaged ({error}): remove {work.parent} and encode again") from None
        if not same:
            raise DataError(
                f"{work.parent} holds an unfinished encoding of other inputs or with other settings: repeat its "
                "command to finish it, or remove the folder"
            )
        return found

    @classmethod
    def _parse(cls, content: bytes) -> "SharedPlan":
        fields = json.loads(content)
        metadata = fields["probes"]
        if metadata is not None:
            metadata = [one if isinstance(one, str) else MediaMetadata(*map(int, one)) for one in metadata]
        return cls(fields["job"], fields["threads"], metadata)
