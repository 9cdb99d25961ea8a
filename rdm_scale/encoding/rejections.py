"""Rejected inputs, by the one distinction that decides what happens to them: faults of the content, and of the place.

An input that is damaged is rejected for good. One that cannot be read from where it is stored (access denied, a server
that fails after all attempts, a file that has vanished or changed) ends the job, which the same command resumes; or, if
the caller allows a share of such inputs, it is left out and looked for again by the next run.
"""

import re
import threading
from typing import Literal, NamedTuple

from rdm_scale.encoding.media import MediaFile
from rdm_scale.errors import DataError, StorageError

RejectionCause = Literal["content", "storage", "size"]  # size: smaller than the caller wants
_ADDRESS = re.compile(r"(?: object)? at 0x[0-9a-fA-F]+")


class TooSmallError(DataError):
    """An input is smaller than the caller wants."""


class Rejection(NamedTuple):
    """The reason why an input is not encoded."""

    reason: str  # names the file, and is the same in every run
    cause: RejectionCause = "content"


class RejectionPolicy:
    """Judge of errors of inputs. It may be called from several threads at once.

    Args:
        inputs: number of inputs of the job.
        max_unreadable: share of them that may be unreadable.
    """

    def __init__(self, inputs: int, max_unreadable: float) -> None:
        self._allowed, self._share = max_unreadable * inputs, max_unreadable
        self._unreadable: set[str] = set()  # keys
        self._lock = threading.Lock()

    def reject(self, error: DataError, file: MediaFile) -> Rejection:
        """Describe the error of an input.

        Raises:
            StorageError: it cannot be read, and more such inputs have been found than are allowed.
        """
        reason = _ADDRESS.sub("", str(error))
        reason = reason if file.name in reason else f"{file.name}: {reason}"
        if not isinstance(error, StorageError):
            return Rejection(reason, "size" if isinstance(error, TooSmallError) else "content")
        with self._lock:
            self._unreadable.add(file.key)
            number = len(self._unreadable)
        if number > self._allowed:
            raise StorageError(unreadable_message(reason, number, self._share)) from None
        return Rejection(reason, "storage")


def unreadable_message(reason: str, number: int, share: float) -> str:
    """Message of a job that ends because inputs cannot be read."""
    many = f" {number} inputs could not be read, more than a share of {share}." if share else ""
    return (
        f"{reason}.{many} This is a failure of the place where inputs are stored, or a wrong path, not a damaged "
        "input: run the same command again once it can be read, which keeps what is done; or allow a share of the "
        "inputs to be missing with --max-unreadable"
    )
