"""Output folders of an encoding job, and the check that the job may write to them."""

import re
from contextlib import suppress
from dataclasses import dataclass

from rdm_scale.data.manifest import MANIFEST_NAME, read_manifest
from rdm_scale.encoding.planning import Split
from rdm_scale.encoding.shared_plan import OtherJobError, SharedPlan
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location

REJECTED_NAME = "rejected.jsonl"
_WORK = ".encoding"
# A killed process may leave partial files behind.
_SHARD = re.compile(r"(shard|text)-\d+\.tar(\.partial-[\d-]+)?")
_OTHERS = re.compile(rf"{re.escape(_WORK)}|({MANIFEST_NAME}|{REJECTED_NAME})(\.partial-[\d-]+)?")

_PICTURE = re.compile(
    r"(statistics|decoded|preview).*\.(png|gif)(\.partial-[\d-]+)?"
)  # of --stats, --decode, --preview


@dataclass(frozen=True)
class OutputFolders:
    """Folders of the latent shards of a job, one for each split."""

    train: Location
    holdout: Location | None = None

    @property
    def work(self) -> Location:
        """Folder of the shared plan, the inventory of the inputs and the records, to resume or repeat the job."""
        return self.train / _WORK

    @property
    def rejected(self) -> Location:
        """File that lists the rejected inputs, if there are any."""
        return self.train / REJECTED_NAME

    @property
    def by_split(self) -> dict[Split, Location]:
        folders: dict[Split, Location] = {"train": self.train}
        if self.holdout:
            folders["holdout"] = self.holdout
        return folders

    def check(self, digest: str) -> bool:
        """Check that a job may write here, and return True if it is complete already.

        Args:
            digest: digest of the job, or the beginning of it.

        Raises:
            DataError: one folder is inside the other, or contains anything but output of jobs and pictures of it.
            OtherJobError: a folder contains the output of another job.
        """
        if self.holdout and (self.holdout.is_inside(self.train) or self.train.is_inside(self.holdout)):
            raise DataError(f"{self.holdout} and {self.train} must be separate folders, neither inside the other")
        try:
            complete = [self._check_folder(folder, digest) for folder in self.by_split.values()]
        except OSError as error:
            raise DataError(f"cannot list the output folder: {error}") from None
        return all(complete)

    def has_manifest(self) -> bool:
        """True once the job is complete: the manifest of the training split is written last."""
        return MANIFEST_NAME in self.train.names()

    def shard_files(self, split: Split) -> dict[str, int]:
        """Shards of a split, partial ones included, and their bytes."""
        return {name: stat.bytes for name, stat in self.by_split[split].stats().items() if _SHARD.fullmatch(name)}

    def _check_folder(self, folder: Location, digest: str) -> bool:
        if folder.exists() and not folder.is_dir():
            raise DataError(f"the output {folder} is a file, not a folder: choose another one")
        names = folder.names()
        if MANIFEST_NAME in names:
            if not read_manifest(str(folder))[0].job.startswith(digest):
                raise OtherJobError(
                    f"{folder} already holds encoded data, of other inputs or made with other settings: "
                    "choose another folder or remove it"
                )
            return True
        if strange := [name for name in names if not any(own.fullmatch(name) for own in (_SHARD, _OTHERS, _PICTURE))]:
            raise DataError(f"{folder} is not empty (it contains {strange[0]}): choose another folder")
        if _WORK in names:
            with suppress(FileNotFoundError):  # it is not written yet, or other ranks have just finished and removed it
                SharedPlan.read(folder / _WORK, digest)
        return False
