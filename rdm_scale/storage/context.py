"""The storage settings of this process: the current retry policy, and the S3 clients that its threads share.

They are process-wide. Locations are made from URLs in every room, so passing a policy along would touch every function
that takes a URL. A `contextvars.ContextVar` would not do: reader and prefetch threads do not inherit it.
"""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rdm_scale.storage.retries import Retry

if TYPE_CHECKING:  # importing the client takes half a second
    from rdm_scale.storage.s3_client import S3Client


@dataclass(frozen=True, eq=False)
class _Policy:
    """One entry of the stack of policies, compared by identity: each override removes its own entry."""

    retry: Retry


class StorageContext:
    """A retry policy with temporary overrides, and a pool of S3 clients. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._policies: tuple[_Policy, ...] = (_Policy(Retry()),)  # immutable: reads need no lock
        self._clients: dict[tuple[object, ...], S3Client] = {}
        self._lock = threading.Lock()

    @property
    def retry(self) -> Retry:
        """The current policy: that of the most recent override, or the one that was set."""
        return self._policies[-1].retry

    @retry.setter
    def retry(self, retry: Retry) -> None:
        with self._lock:
            self._policies = (_Policy(retry), *self._policies[1:])

    @contextmanager
    def overriding(self, retry: Retry) -> Iterator[None]:
        """Use another policy, in all threads, until the end of the `with` block.

        Overrides of several threads may end in any order; each ends its own.
        """
        policy = _Policy(retry)
        with self._lock:
            self._policies = (*self._policies, policy)
        try:
            yield
        finally:
            with self._lock:
                self._policies = tuple(each for each in self._policies if each is not policy)

    def s3_client(self, options: Mapping[str, Any]) -> "S3Client":
        """The client for these options and the AWS_* environment, shared by all threads.

        fsspec's own cache would keep one client per thread, even after the environment has changed. A forked process
        creates a new client, because connections cannot be shared.
        """
        from rdm_scale.storage.s3_client import S3Client

        environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
        stall_s = self.retry.stall_s
        key = os.getpid(), repr(sorted(options.items())), environment, stall_s
        with self._lock:
            if key not in self._clients:
                self._clients[key] = S3Client(options, stall_s)
            return self._clients[key]


PROCESS = StorageContext()


def current_retry() -> Retry:
    """The current retry policy of this process."""
    return PROCESS.retry


def set_retry(retry: Retry) -> None:
    """Set the retry policy of this process, for all its threads."""
    PROCESS.retry = retry


@contextmanager
def retrying(retry: Retry) -> Iterator[None]:
    """Use another retry policy, in all threads of this process, until the end of the `with` block."""
    with PROCESS.overriding(retry):
        yield
