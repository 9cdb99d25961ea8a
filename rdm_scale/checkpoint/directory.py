"""The directory of a run's checkpoints, on any file system: save, list, open and prune checkpoints.

A checkpoint is a folder `step_00000100` that holds the ranks' tensors, `state.json` and, written last, `commit.json`
with the size and checksum of every other file. A folder without a valid `commit.json` is not a checkpoint. Nothing here
communicates with other ranks: the caller decides which rank calls what, and waits for all ranks' files before the
commit.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from rdm_scale.checkpoint.format.index import FileRecord, digest
from rdm_scale.checkpoint.format.reader import TensorReader
from rdm_scale.checkpoint.format.slices import SliceTable
from rdm_scale.checkpoint.state import CheckpointState
from rdm_scale.errors import CheckpointError, IncompleteError
from rdm_scale.storage.json_files import read_bounded
from rdm_scale.storage.location import Location

COMMIT, STATE = "commit.json", "state.json"
_MAX_JSON_BYTES = 2**28  # checkpoints from others are untrusted; a commit of 10,000 ranks takes 2 MB
_VERSION: Literal[2] = 2  # version 1 had JSON indices
_STEP = re.compile(r"step_(\d{8}|[1-9]\d{8,17})")


class _Commit(BaseModel):
    """Content of `commit.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["rdm_scale.checkpoint"] = "rdm_scale.checkpoint"
    version: Literal[2] = _VERSION
    files: tuple[FileRecord, ...]
    xxh3: str

    @property
    def is_intact(self) -> bool:
        return self.xxh3 == _checksum([file.model_dump_json().encode() for file in self.files])

    @staticmethod
    def encode(files: Sequence[bytes]) -> bytes:
        """JSON of the commit of encoded records. Joins them without a look inside: there may be tens of thousands."""
        head = f'{{"format":"rdm_scale.checkpoint","version":{_VERSION},"files":['
        return head.encode() + b",".join(files) + f'],"xxh3":"{_checksum(files)}"}}'.encode()


def _checksum(files: Sequence[bytes]) -> str:
    return digest(b"\n".join(files))


class OpenedCheckpoint(NamedTuple):
    """State and tensors of a checkpoint."""

    state: CheckpointState
    reader: TensorReader


class CheckpointContents(NamedTuple):
    """State of a checkpoint, and the records of its files: read by one rank for all."""

    state: CheckpointState
    files: tuple[FileRecord, ...]

    def open(self, folder: Location, needed: SliceTable | None = None) -> OpenedCheckpoint:
        """State and reader, without another look at the folder."""
        return OpenedCheckpoint(self.state, TensorReader(folder, self.files, needed))


class NewestCheckpoint(NamedTuple):
    """Result of the search for the newest complete checkpoint."""

    step: int | None  # None if there is none
    skipped: list[str]  # the reason for each later one that is not complete


class CheckpointDirectory:
    """Checkpoints of one run, one folder per step. Other entries of the directory are never touched."""

    def __init__(self, root: Location) -> None:
        self.root = root

    def folder(self, step: int) -> Location:
        """Folder of the checkpoint of `step`, which need not exist."""
        return self.root / f"step_{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in ascending order."""
        return [step for step in self._all_steps() if is_checkpoint(self.folder(step))]

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self.newest().step

    def newest(self) -> NewestCheckpoint:
        """Find the newest checkpoint that is complete and whose files have the right sizes.

        Raises:
            CheckpointError: a later checkpoint cannot be read, so it is unknown if it is complete.
        """
        reasons: list[str] = []
        for step in reversed(self._all_steps()):
            try:
                _read_state(self.folder(step), _verified_commit(self.folder(step)))
            except IncompleteError as error:
                reasons.append(str(error))
            else:
                return NewestCheckpoint(step, reasons)
        return NewestCheckpoint(None, reasons)

    def begin(self, step: int) -> Location:
        """Create an empty folder for the checkpoint of `step`.

        Files left there by an interrupted save, or by a run that was resumed from an earlier step, are removed.

        Raises:
            CheckpointError: the folder cannot be created.
        """
        folder = self.folder(step)
        with os_errors_reported(f"prepare {folder}"):
            self._remove(step)
            folder.make_dir()
        return folder

    def commit(self, step: int, state: CheckpointState, files: Sequence[FileRecord | bytes]) -> None:
        """Complete the checkpoint of `step` after all ranks have written their files.

        Args:
            step: the step that `begin` was called with.
            state: content of `state.json`; must be of the same step.
            files: the records of all ranks' files, or their JSON.

        Raises:
            CheckpointError: the commit cannot be written, and the folder is not a checkpoint.
        """
        folder = self.folder(step)
        if state["step"] != step:
            raise ValueError(f"the state is of step {state['step']}, not {step}")
        content = json.dumps(state, indent=1, allow_nan=False).encode()
        record = FileRecord(name=STATE, bytes=len(content), xxh3=digest(content))
        encoded = [each if isinstance(each, bytes) else each.model_dump_json().encode() for each in [*files, record]]
        with os_errors_reported(f"complete {folder}"):
            (folder / STATE).write(content)
            _sync(folder)  # file names first, so that a power failure cannot leave a commit without them
            (folder / COMMIT).write(_Commit.encode(encoded))
            _sync(folder)
            _sync(self.root)

    def open(self, step: int) -> OpenedCheckpoint:
        """Open the checkpoint of `step`. Raises CheckpointError as `open_checkpoint` does."""
        return open_checkpoint(self.folder(step))

    def abandon(self, step: int) -> None:
        """Remove a checkpoint, complete or not."""
        with os_errors_reported(f"remove {self.folder(step)}"):
            self._remove(step)

    def prune(self, saved: int, keep: int, every: int = 0) -> None:
        """Remove old checkpoints, and interrupted saves that are older than the newest complete checkpoint.

        Args:
            saved: the step just saved. Later ones are neither counted nor removed: a run that was resumed from an
                earlier step left them, and they may be damaged.
            keep: number of newest checkpoints to keep; 0 keeps all.
            every: also keep the checkpoints whose step is a multiple of this, if not 0.
        """
        steps = [step for step in self._all_steps() if step <= saved]
        complete = [step for step in steps if is_checkpoint(self.folder(step))]
        if not complete:
            return
        old = complete[:-keep] if keep else []
        for step in steps:
            interrupted = step < complete[-1] and not (self.folder(step) / COMMIT).exists()
            if interrupted or (step in old and not (every and step % every == 0)):
                self.abandon(step)

    def _all_steps(self) -> list[int]:
        with os_errors_reported(f"list {self.root}"):
            matches = [_STEP.fullmatch(name) for name in self.root.names()]
            steps = sorted(int(match[1]) for match in matches if match)
            return [step for step in steps if self.folder(step).is_dir()]

    def _remove(self, step: int) -> None:
        folder = self.folder(step)
        commit = folder / COMMIT
        if commit.exists():  # first, so that after an interrupted removal the folder is not a checkpoint
            commit.remove()
            _sync(folder)
        if folder.exists():
            folder.remove()


def is_checkpoint(folder: Location) -> bool:
    """Test if the folder holds a committed checkpoint; only `open_checkpoint` verifies that all files exist.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    try:
        _read_commit(folder)
    except IncompleteError:
        return False
    return True


def read_state(folder: Location) -> CheckpointState:
    """Read the state of a complete checkpoint. Raises CheckpointError as `open_checkpoint` does."""
    return _read_state(folder, _read_commit(folder))


def open_checkpoint(folder: Location, needed: SliceTable | None = None) -> OpenedCheckpoint:
    """Open the checkpoint in `folder` after verifying the sizes of all its files.

    Args:
        folder: the checkpoint's folder.
        needed: the slices that will be read, if known; see TensorReader.

    Raises:
        IncompleteError: it was never completed, or a file is missing, truncated or damaged.
        CheckpointError: it cannot be read.
    """
    return read_contents(folder).open(folder, needed)


def read_contents(folder: Location) -> "CheckpointContents":
    """Read what all ranks need of a checkpoint, after verifying the sizes of its files. Raises as `open_checkpoint`."""
    commit = _verified_commit(folder)
    return CheckpointContents(_read_state(folder, commit), commit.files)


def _verified_commit(folder: Location) -> _Commit:
    """Read the commit and verify that all files exist and have the recorded sizes."""
    commit = _read_commit(folder)
    with os_errors_reported(f"list {folder}"):
        found = folder.stats()  # one listing: a request for each of thousands of files is slow on S3
    for file in commit.files:
        if file.name not in found:
            raise IncompleteError(f"{folder / file.name} is missing: the checkpoint is damaged; use another one")
        if found[file.name].bytes != file.bytes:
            raise IncompleteError(
                f"{folder / file.name} has {found[file.name].bytes:,} bytes instead of {file.bytes:,}: the checkpoint "
                "is damaged; use another one"
            )
    return commit


def _read_commit(folder: Location) -> _Commit:
    where = folder / COMMIT
    try:
        commit = _Commit.model_validate_json(_read_json(where))
    except FileNotFoundError:
        if not folder.exists():
            raise IncompleteError(f"there is no checkpoint {folder}: check the path") from None
        raise IncompleteError(
            f"{folder} has no {COMMIT}: it is not a checkpoint, or saving it was interrupted; use another one"
        ) from None
    except ValidationError as error:
        other = next((e["input"] for e in error.errors() if e["loc"] == ("version",)), None)
        if other is not None:
            raise CheckpointError(
                f"{where} has version {other!r} of the format, and only version {_VERSION} is read: use the release "
                "that wrote it, or another checkpoint"
            ) from None
        raise IncompleteError(f"{where} is damaged: {error.errors()[0]['msg']}; use another checkpoint") from None
    if not commit.is_intact:
        raise IncompleteError(f"{where} is damaged: its checksum differs; use another checkpoint")
    if len({file.name for file in commit.files}) != len(commit.files):
        raise IncompleteError(f"{where} lists a file twice: it was not written by rdm_scale; use another checkpoint")
    return commit


def _read_state(folder: Location, commit: _Commit) -> CheckpointState:
    where = folder / STATE
    expected = next((file.xxh3 for file in commit.files if file.name == STATE), None)
    try:
        content = _read_json(where)
    except FileNotFoundError:
        raise IncompleteError(f"{where} is missing: the checkpoint is damaged; use another one") from None
    if digest(content) != expected:
        raise IncompleteError(f"{where} is damaged: its checksum differs; use another checkpoint")
    try:
        state = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise IncompleteError(f"{where} is not JSON: {error}; use another checkpoint") from None
    if not isinstance(state, dict) or type(state.get("step")) is not int:
        raise IncompleteError(f"{where} has no step: it was not written by rdm_scale; use another checkpoint")
    return cast(CheckpointState, state)


def _read_json(where: Location) -> bytes:
    """Read a file. Raises FileNotFoundError, or CheckpointError if it is too large or cannot be read."""
    try:
        return read_bounded(where, IncompleteError, _MAX_JSON_BYTES)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {where}: {error.strerror or error}") from error


def _sync(folder: Location) -> None:
    """Flush the directory entries of a local folder to disk; object stores do not need it."""
    if folder.is_local:
        descriptor = os.open(folder.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def os_errors_reported(action: str) -> Iterator[None]:
    """Turn OSErrors into CheckpointErrors that name the action."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot {action}: {error.strerror or error}") from error
