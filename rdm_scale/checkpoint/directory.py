"""The directory of a run's checkpoints, on any file system: which are complete, which is the newest, which must go.

A checkpoint is a folder `step_00000100` that holds the ranks' tensors, `state.json` and, written last, `commit.json`
with the size and checksum of every other file. Without a valid `commit.json` it does not count. Nothing here talks to
other ranks: the caller decides who calls what, and waits for all ranks' files before the commit.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from rdm_scale.checkpoint.format.index import FileRecord, digest
from rdm_scale.checkpoint.format.reader import TensorReader
from rdm_scale.checkpoint.format.slices import SliceTable
from rdm_scale.errors import CheckpointError, IncompleteError
from rdm_scale.storage.location import Location

COMMIT, STATE = "commit.json", "state.json"
_MAX_JSON_BYTES = 2**28  # files from elsewhere are untrusted; a commit of 10,000 ranks takes 2 MB
_VERSION: Literal[2] = 2  # 1 had its indices in JSON
_STEP = re.compile(r"step_(\d{8}|[1-9]\d{8,17})")


class _Commit(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["rdm_scale.checkpoint"] = "rdm_scale.checkpoint"
    version: Literal[2] = _VERSION
    files: tuple[FileRecord, ...]
    xxh3: str

    @staticmethod
    def of(files: Sequence[FileRecord]) -> "_Commit":
        content = "\n".join(file.model_dump_json() for file in files)
        return _Commit(files=tuple(files), xxh3=digest(content.encode()))


class OpenedCheckpoint(NamedTuple):
    """State and tensors of a checkpoint."""

    state: dict[str, Any]
    reader: TensorReader


class CheckpointDirectory:
    """Checkpoints of one run, a folder for each step. Other entries of the directory are never touched."""

    def __init__(self, root: Location) -> None:
        self.root = root

    def folder(self, step: int) -> Location:
        return self.root / f"step_{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return [step for step in self._all() if is_checkpoint(self.folder(step))]

    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        return self.newest()[0]

    def newest(self) -> tuple[int | None, list[str]]:
        """The step of the newest checkpoint that is complete, with files of the right sizes, and why each later one
        is not it. Raises CheckpointError when one cannot be read: it may be the newest."""
        reasons: list[str] = []
        for step in reversed(self._all()):
            try:
                _read_state(self.folder(step), _verified_commit(self.folder(step)))
            except IncompleteError as error:
                reasons.append(str(error))
            else:
                return step, reasons
        return None, reasons

    def begin(self, step: int) -> Location:
        """An empty folder for the checkpoint of `step`; what an interrupted save, or a run that was taken back to an
        earlier step, left there is removed. Raises CheckpointError when it cannot be made."""
        folder = self.folder(step)
        with _reported(f"prepare {folder}"):
            self._remove(step)
            folder.make_dir()
        return folder

    def commit(self, step: int, state: Mapping[str, Any], files: Sequence[FileRecord]) -> None:
        """Makes the checkpoint of `step` complete, after all ranks have written their files.

        Args:
            state: JSON, with `step` and whatever training needs to go on.
            files: the records of all ranks' files.

        Raises:
            CheckpointError: it cannot be written; then the checkpoint does not count.
        """
        folder = self.folder(step)
        if state["step"] != step:
            raise ValueError(f"the state is of step {state['step']}, not {step}")
        content = json.dumps(state, indent=1, allow_nan=False).encode()
        record = FileRecord(name=STATE, bytes=len(content), xxh3=digest(content))
        with _reported(f"complete {folder}"):
            (folder / STATE).write(content)
            _sync(folder)  # names of files first, so that a power cut cannot leave a commit without them
            (folder / COMMIT).write(_Commit.of([*files, record]).model_dump_json().encode())
            _sync(folder)
            _sync(self.root)

    def open(self, step: int) -> OpenedCheckpoint:
        """State and tensors of the checkpoint of `step`. Raises CheckpointError as `open_checkpoint` does."""
        return open_checkpoint(self.folder(step))

    def abandon(self, step: int) -> None:
        """Removes what there is of a checkpoint that could not be completed."""
        with _reported(f"remove {self.folder(step)}"):
            self._remove(step)

    def prune(self, keep: int, every: int = 0) -> None:
        """Removes all complete checkpoints but the newest `keep` (0 keeps all) and those of every so many steps,
        and what interrupted saves have left that is older than the newest complete one."""
        complete = self.steps()
        if not complete:
            return
        old = complete[:-keep] if keep else []
        for step in self._all():
            interrupted = step < complete[-1] and not (self.folder(step) / COMMIT).exists()
            if interrupted or (step in old and not (every and step % every == 0)):
                self.abandon(step)

    def _all(self) -> list[int]:
        with _reported(f"list {self.root}"):
            matches = [_STEP.fullmatch(name) for name in self.root.names()]
            steps = sorted(int(match[1]) for match in matches if match)
            return [step for step in steps if self.folder(step).is_dir()]

    def _remove(self, step: int) -> None:
        folder = self.folder(step)
        commit = folder / COMMIT
        if commit.exists():  # first, so that an interrupted removal cannot be taken for a checkpoint
            commit.remove()
            _sync(folder)
        if folder.exists():
            folder.remove()


def is_checkpoint(folder: Location) -> bool:
    """Whether the folder holds a checkpoint that was completed; `open_checkpoint` finds out whether it still is.
    Raises CheckpointError when that cannot be read."""
    try:
        _read_commit(folder)
    except IncompleteError:
        return False
    return True


def read_state(folder: Location) -> dict[str, Any]:
    """The state that a complete checkpoint was committed with. Raises CheckpointError as `open_checkpoint` does."""
    return _read_state(folder, _read_commit(folder))


def open_checkpoint(folder: Location, needed: SliceTable | None = None) -> OpenedCheckpoint:
    """State and tensors of the checkpoint in `folder`, after the sizes of all its files have been verified.

    Args:
        needed: the slices that will be read, see TensorReader.

    Raises:
        CheckpointError: it was never completed, or a file is missing, truncated or damaged (IncompleteError); or it
            cannot be read. The message says which.
    """
    commit = _verified_commit(folder)
    return OpenedCheckpoint(_read_state(folder, commit), TensorReader(folder, commit.files, needed))


def _verified_commit(folder: Location) -> _Commit:
    """The commit of a checkpoint whose files are all there, with the sizes that it says."""
    commit = _read_commit(folder)
    with _reported(f"list {folder}"):
        there = folder.stats()  # one listing: asking for each of thousands is slow on S3
    for file in commit.files:
        if file.name not in there:
            raise IncompleteError(f"{folder / file.name} is missing: the checkpoint is damaged; use another one")
        if there[file.name].bytes != file.bytes:
            raise IncompleteError(
                f"{folder / file.name} has {there[file.name].bytes:,} bytes instead of {file.bytes:,}: the checkpoint "
                "is damaged; use another one"
            )
    return commit


def _read_commit(folder: Location) -> _Commit:
    where = folder / COMMIT
    try:
        commit = _Commit.model_validate_json(_read_json(where))
    except FileNotFoundError:
        if not folder.exists():
            raise IncompleteError(f"there is no checkpoint {folder}") from None
        raise IncompleteError(
            f"{folder} has no {COMMIT}: it is no checkpoint, or saving it was interrupted; use another one"
        ) from None
    except ValidationError as error:
        other = next((e["input"] for e in error.errors() if e["loc"] == ("version",)), None)
        if other is not None:
            raise CheckpointError(
                f"{where} has version {other!r} of the format, and only version {_VERSION} is read: use the release "
                "that wrote it, or another checkpoint"
            ) from None
        raise IncompleteError(f"{where} is damaged: {error.errors()[0]['msg']}; use another checkpoint") from None
    if commit != _Commit.of(commit.files):
        raise IncompleteError(f"{where} is damaged: its checksum differs; use another checkpoint")
    if len({file.name for file in commit.files}) != len(commit.files):
        raise IncompleteError(f"{where} lists a file twice: it is not one of ours")
    return commit


def _read_state(folder: Location, commit: _Commit) -> dict[str, Any]:
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
        raise IncompleteError(f"{where} is not JSON: {error}") from None
    if not isinstance(state, dict) or type(state.get("step")) is not int:
        raise IncompleteError(f"{where} does not say at which step it was written: it is not one of ours")
    return state


def _read_json(where: Location) -> bytes:
    """The file's bytes. Raises FileNotFoundError, or CheckpointError when it is too large or cannot be read."""
    try:
        content = where.read_range(0, _MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {where}: {error.strerror or error}") from error
    if len(content) > _MAX_JSON_BYTES:
        raise IncompleteError(f"{where} is larger than it can be ({_MAX_JSON_BYTES:,} bytes)")
    return content


def _sync(folder: Location) -> None:
    """Makes the names in a local folder durable; object stores have no such state."""
    if folder.is_local:
        descriptor = os.open(folder.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _reported(action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot {action}: {error.strerror or error}") from error
