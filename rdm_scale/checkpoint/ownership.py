"""Ownership of a directory of checkpoints: one run, and one process of it, writes there at a time.

`owner.json` in the directory names the run, by the id in its own directory, and the process, which renews the file
every 20 s. Another run is refused; once the file has not been renewed for 60 s (the lease), or the owner has ended, it
may take the directory over if it is asked to. A new process of the same run takes its place at once, and the earlier
process finds out before it writes again. Ages are differences between two files' times by the clock of the store, so
that clocks of machines do not matter.
"""

import os
import socket
import threading
import uuid
from contextlib import suppress
from types import TracebackType
from typing import Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from rdm_scale.errors import OwnershipError
from rdm_scale.storage.json_files import read_bounded
from rdm_scale.storage.location import Location, ReplacedError, Retry, retrying

OWNER = "owner.json"
LEASE_S = 60.0
_RENEWALS = 3  # in the time of a lease
_CLOSING_S = 5.0  # a failing run must not be kept from saying why
_ATTEMPTS = 3  # to claim a directory that others are claiming


class OwnerMark(BaseModel):
    """Content of `owner.json`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    format: Literal["rdm_scale.owner"] = "rdm_scale.owner"
    version: Literal[1] = 1
    run: str  # id
    session: str  # id of the process
    run_dir: str
    process: str  # for people
    ended: bool = False


class _FoundMark(NamedTuple):
    mark: OwnerMark | None  # None: the file is damaged
    version: str


def new_id() -> str:
    """Identify a run or a process, uniquely."""
    return uuid.uuid4().hex


class Ownership:
    """Lease of a directory by this process, renewed by a thread until `close`."""

    def __init__(self, root: Location, mark: OwnerMark, lease_s: float) -> None:
        self.root, self.mark, self.lease_s = root, mark, lease_s
        self._successor: str | None = None  # who has taken the directory
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="ownership", daemon=True)
        self._thread.start()

    @staticmethod
    def claim(
        root: Location, run: str, run_dir: str, *, take_over: bool = False, lease_s: float = LEASE_S
    ) -> "Ownership":
        """Make this process the owner of a directory, which exists.

        Args:
            run: id of the run.
            run_dir: its directory, for messages.
            take_over: take the directory of another run, whose lease has expired.
            lease_s: seconds after the last renewal when the owner counts as gone.

        Raises:
            OwnershipError: another run owns it.
            OSError: the directory cannot be read or written.
        """
        process = f"process {os.getpid()} on {socket.gethostname()}"
        mark = OwnerMark(run=run, session=new_id(), run_dir=run_dir, process=process)
        for _ in range(_ATTEMPTS):
            found = _read(root)
            if found is not None and (found.mark is None or found.mark.run != run):
                _refuse_owner(root, found, take_over, lease_s)
            with suppress(ReplacedError):
                (root / OWNER).write_if(_encode(mark), None if found is None else found.version)
            now = _read(root)  # also after an error: an attempt whose answer was lost may have written it
            if now is not None and now.mark == mark:
                return Ownership(root, mark, lease_s)
        raise OwnershipError(f"{root} is being claimed by several processes at once: start one run there")

    def confirm(self) -> None:
        """Raise OwnershipError if another process has taken the directory; reads the mark."""
        self._look()
        self.check()

    def check(self) -> None:
        """Raise OwnershipError if another process is known to have taken the directory; costs nothing."""
        if self._successor is not None:
            raise OwnershipError(
                f"{self.root} was taken over by {self._successor}: this process ends, and nothing more is written "
                "there. If that was not intended, end one of the two: a directory serves one process at a time"
            )

    def close(self) -> None:
        """Stop renewing, and say in the mark that the process has ended, if the store answers soon."""
        self._closing.set()
        self._thread.join(_CLOSING_S)
        with suppress(OSError), retrying(Retry.within(_CLOSING_S)):
            self._renew(self.mark.model_copy(update={"ended": True}))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _keep(self) -> None:
        while not self._closing.wait(self.lease_s / _RENEWALS) and self._successor is None:
            with suppress(OSError):  # tried again; until then the lease may expire, but others take it only on request
                self._renew(self.mark)

    def _renew(self, mark: OwnerMark) -> None:
        found = self._look()
        if self._successor is None:
            (self.root / OWNER).write_if(_encode(mark), None if found is None else found.version)

    def _look(self) -> _FoundMark | None:
        found = _read(self.root)
        if found is not None and (found.mark is None or found.mark.session != self.mark.session):
            self._successor = "an unknown process" if found.mark is None else _describe(found.mark)
        return found


def refuse_other_owner(root: Location, run: str | None, take_over: bool) -> None:
    """Refuse a directory that another run owns, without writing anything.

    Args:
        run: id of this run; None: it has none yet.
        take_over: the directory may be taken if the other's lease has expired, which `Ownership.claim` finds out.

    Raises:
        OwnershipError: another run owns it.
        OSError: the mark cannot be read.
    """
    found = _read(root)
    if found is not None and not take_over and (found.mark is None or found.mark.run != run):
        _refuse_owner(root, found, take_over=False, lease_s=LEASE_S)


def _refuse_owner(root: Location, found: _FoundMark, take_over: bool, lease_s: float) -> None:
    """Raise OwnershipError unless the directory may be taken over from the owner that was found."""
    mark = found.mark
    who = "an unknown run" if mark is None else _describe(mark)
    if mark is not None and mark.ended:
        if take_over:
            return
        state, when = "that run has ended", ""
    elif take_over:
        age_s = _age(root)
        if age_s > lease_s:
            return
        state = f"that run was alive {age_s:.0f} s ago"
        when = f" {lease_s:.0f} s after it was last alive"
    else:
        state = "that run may be alive"
        when = f" {lease_s:.0f} s after it was last alive"
    raise OwnershipError(
        f"the checkpoints in {root} belong to {who}; {state}. Set checkpoint.dir elsewhere; or, to go on with those "
        f"checkpoints in this run, set checkpoint.take_over=true{when and ', which is possible'}{when}"
    )


def _age(root: Location) -> float:
    """Seconds since the mark was written, by the clock of the store."""
    now = root / f".now-{new_id()}"
    now.write(b"x")
    try:
        return now.modified() - (root / OWNER).modified()
    finally:
        now.remove()


def _describe(mark: OwnerMark) -> str:
    return f"the run in {mark.run_dir} ({mark.process})"


def _encode(mark: OwnerMark) -> bytes:
    return mark.model_dump_json(indent=1).encode()


def _read(root: Location) -> _FoundMark | None:
    """Mark of a directory with its version; None where there is none."""
    file = root / OWNER
    try:
        version = file.stat().version  # first: the content is of this version or a later one, whose owner it names
        content = read_bounded(file, OwnershipError)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return _FoundMark(OwnerMark.model_validate_json(content), version)
    except ValidationError:
        return _FoundMark(None, version)
