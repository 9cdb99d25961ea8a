"""Another try for what may work a moment later at an object store, within a budget of time that nothing extends."""

import errno
import http.client
import logging
import random
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Retry:
    """How long and how often a call to an object store is tried.

    attempts: tries of one call, at most.
    budget_s: seconds that one call may take, with all its tries and the waits between them. Progress does not extend
        it, so a server that sends a byte a second does not evade it.
    stall_s: seconds without a byte after which a try is given up. S3 clients take it over when they are made, so set it
        before the first `Location`.
    first_wait_s, longest_wait_s: the waits between tries double from one to the other; each is shortened by up to
        half at random, so that many ranks do not come back at the same instant.
    slowest_bytes_s: what a write sends may take this much longer than `budget_s`.
    """

    attempts: int = 12
    budget_s: float = 45.0
    stall_s: float = 10.0
    first_wait_s: float = 0.1
    longest_wait_s: float = 5.0
    slowest_bytes_s: float = 2.0**20

    @classmethod
    def within(cls, budget_s: float) -> "Retry":
        """For calls that may take so long: a try that stalls leaves time for two more."""
        return cls(budget_s=budget_s, stall_s=min(cls.stall_s, budget_s / 3))


_current = Retry()


def current_retry() -> Retry:
    """What holds for this process."""
    return _current


def set_retry(retry: Retry) -> None:
    """Sets what holds for this process from now on, in all its threads."""
    global _current
    _current = retry


@contextmanager
def retrying(retry: Retry) -> Iterator[None]:
    """`set_retry`, undone at the end."""
    before = current_retry()
    set_retry(retry)
    try:
        yield
    finally:
        set_retry(before)


@dataclass(frozen=True)
class Failure:
    """What a failed try says. status: HTTP status, 0 without an answer. code: of the store's error document."""

    text: str
    status: int = 0
    code: str = ""
    passing: bool = False  # another try may work


class StatusError(Exception):
    """An answer of an object store other than success."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status, self.code, self.message = status, code, message


class ShortBodyError(Exception):
    """An answer with fewer bytes than it promised."""


class GaveUpError(OSError):
    """No try worked: `tries` in `seconds`, the last of them ended as `last` says."""

    def __init__(self, tries: int, seconds: float, last: Failure) -> None:
        super().__init__(f"{tries} {'try' if tries == 1 else 'tries'} in {seconds:.1f} s, the last: {last.text}")
        self.tries, self.seconds, self.last = tries, seconds, last


def call_with_retries(name: str, attempt: Callable[[float], T], extra_s: float = 0.0) -> T:
    """What `attempt` returns; it is given the seconds that are left, and must end within them.

    Args:
        name: of what is called, for the log.
        extra_s: seconds more than the budget.

    Raises:
        GaveUpError: what went wrong may pass, but not within the attempts and the budget.
        Exception: what `attempt` raised and another try would not mend.
    """
    retry = current_retry()
    began = time.monotonic()
    deadline = began + retry.budget_s + extra_s
    wait, tries = retry.first_wait_s, 0
    while True:
        tries += 1
        try:
            return attempt(max(deadline - time.monotonic(), 1e-3))
        except Exception as error:
            failure = describe(error)
            if not failure.passing:
                raise
            now, pause = time.monotonic(), wait * random.uniform(0.5, 1)
            if tries >= retry.attempts or now + pause >= deadline:
                raise GaveUpError(tries, now - began, failure) from error
            level = logging.INFO if tries < 3 else logging.WARNING
            _log.log(level, "%s: %s; try %d of %d in %.1f s", name, failure.text, tries + 1, retry.attempts, pause)
        time.sleep(pause)
        wait = min(2 * wait, retry.longest_wait_s)


_PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504}
_PASSING_CODES = {
    "IncompleteBody",
    "InternalError",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
}
_PASSING_ERRNO = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN}
# By name: these libraries need not be installed, and take long to import.
_PASSING_ERRORS = {
    "aiohttp.client_exceptions.ClientError",
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.CredentialRetrievalError",
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.IncompleteReadError",
    "botocore.parsers.ResponseParserError",
    "urllib3.exceptions.HTTPError",
}


def describe(error: BaseException) -> Failure:
    """What an error of any client says, and whether it may pass. Those of file systems have their client's as cause."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__
    for each in causes:
        if answer := _answer(each):
            status, code, message = answer
            named = code and not code.isdecimal()
            passing = status in _PASSING_STATUS or code in _PASSING_CODES
            return Failure(f"{status} {code if named else message}".strip(), status, code if named else "", passing)
    names = {f"{kind.__module__}.{kind.__qualname__}" for each in causes for kind in type(each).__mro__}
    text = str(error) or type(error).__name__
    if any(isinstance(each, ssl.SSLCertVerificationError) for each in causes) or "CERTIFICATE_VERIFY_FAILED" in text:
        return Failure(text)
    if isinstance(error, TimeoutError) and not error.args:
        text = "no answer in time"
    passing = bool(names & _PASSING_ERRORS) or any(
        isinstance(
            each,
            ConnectionError
            | TimeoutError
            | ShortBodyError
            | http.client.HTTPException
            | socket.gaierror
            | ssl.SSLError,
        )
        or (isinstance(each, OSError) and each.errno in _PASSING_ERRNO)
        for each in causes
    )
    return Failure(text, passing=passing)


def _answer(error: BaseException) -> tuple[int, str, str] | None:
    """(status, code, message) of an error that stands for an answer."""
    if isinstance(error, StatusError):
        return error.status, error.code, error.message
    response = getattr(error, "response", None)
    if isinstance(response, Mapping) and "ResponseMetadata" in response:  # botocore's ClientError
        document = response.get("Error", {})
        status = response["ResponseMetadata"].get("HTTPStatusCode", 0)
        return int(status), str(document.get("Code", "")), str(document.get("Message", ""))
    if not type(error).__module__.startswith("aiohttp.http_"):  # whose 400 means that it could not read the answer
        for name in ("status", "status_code", "code"):  # clients of other stores
            status = getattr(error, name, None)
            if isinstance(status, int) and 400 <= status < 600:
                return status, "", str(error)
    return None
