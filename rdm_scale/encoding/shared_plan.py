"""The shared plan of a job: what rank 0 finds out once for all ranks and later runs."""

import json
from typing import Any, NamedTuple

from rdm_scale.encoding.planning import MediaMetadata
from rdm_scale.encoding.rejections import Rejection
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location

PLAN_NAME = "plan.json"


class OtherJobError(DataError):
    """An output folder holds encoded data of other inputs, or made with other settings."""


class SharedPlan(NamedTuple):
    """Content of `plan.json`, which is kept in the working folder."""

    digest: str  # of the job
    threads: int  # of a CPU codec; another number would change the last bits of latents
    metadata: list[MediaMetadata | Rejection] | None  # size of each input, or why it has none; None: not needed
    inputs: str | None = None  # digest of the inventory of the inputs; None: written by an earlier version
    decoding: int = 1  # DECODING_VERSION of the records; earlier versions do not state it

    def write(self, work: Location) -> None:
        # A file format: the keys are those of earlier versions.
        probes = None if self.metadata is None else [_as_json(one) for one in self.metadata]
        content = {"job": self.digest, "threads": self.threads, "probes": probes, "inputs": self.inputs} | {
            "decoding": self.decoding
        }
        (work / PLAN_NAME).write(json.dumps(content).encode())

    @staticmethod
    def exists(work: Location) -> bool:
        return (work / PLAN_NAME).exists()

    @staticmethod
    def remove(work: Location) -> None:
        """Remove it, so that the next run reads the metadata of the inputs again."""
        (work / PLAN_NAME).remove()

    @classmethod
    def read(cls, work: Location, digest: str) -> "SharedPlan":
        """Read the plan of the job whose digest is `digest`, or begins with it.

        Raises:
            FileNotFoundError: there is no plan (yet).
            DataError: the plan is damaged; OtherJobError: it belongs to another job.
        """
        file = work / PLAN_NAME
        content = file.read()
        try:
            found = cls._parse(content)
            same = found.digest.startswith(digest)
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise DataError(f"{file} is damaged ({error}): remove {work.parent} and encode again") from None
        if not same:
            raise OtherJobError(
                f"{work.parent} holds an unfinished encoding of other inputs or with other settings: repeat its "
                "command to finish it, or remove the folder"
            )
        return found

    @classmethod
    def _parse(cls, content: bytes) -> "SharedPlan":
        fields = json.loads(content)
        metadata = fields["probes"]
        if metadata is not None:
            metadata = [_from_json(one) for one in metadata]
        return cls(fields["job"], fields["threads"], metadata, fields.get("inputs"), int(fields.get("decoding", 1)))


def _as_json(one: MediaMetadata | Rejection) -> object:
    """Rejections for their content are plain strings, as in earlier versions."""
    if isinstance(one, MediaMetadata):
        return one
    return one.reason if one.cause == "content" else one._asdict()


def _from_json(one: Any) -> MediaMetadata | Rejection:
    if isinstance(one, str):
        return Rejection(one)
    return Rejection(one["reason"], one["cause"]) if isinstance(one, dict) else MediaMetadata(*map(int, one))
