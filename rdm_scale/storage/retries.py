"""Retries of calls to object stores: which errors are transient, and how long a call may take with all its attempts."""

import errno
import http.client
import logging
import random
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Retry:
    """Retry policy: limits on the number and duration of the attempts of one call to an object store.

    Attributes:
        attempts: most attempts of one call.
        budget_s: seconds that one call may take, with all its attempts and the waits between them. Progress does not
            extend it, so a server that sends a byte a second does not evade it.
        stall_s: seconds without a byte after which an attempt is aborted. S3 clients take it when they are created,
            so set it before the first `Location`.
        first_wait_s, longest_wait_s: the waits between attempts double from the first to the longest. Each is
            shortened at random by up to half, so that many ranks do not return at the same instant.
        slowest_bytes_s: lowest upload rate, in bytes per second; the budget of a write grows by its size over this.
    """

    attempts: int = 12
    budget_s: float = 45.0
    stall_s: float = 10.0
    first_wait_s: float = 0.1
    longest_wait_s: float = 5.0
    slowest_bytes_s: float = 2.0**20

    @classmethod
    def within(cls, budget_s: float) -> "Retry":
        """The policy for a budget of `budget_s` seconds: an attempt that stalls leaves time for two more."""
        return cls(budget_s=budget_s, stall_s=min(cls.stall_s, budget_s / 3))


@dataclass(frozen=True)
class Failure:
    """Description of a failed attempt.

    Attributes:
        text: for messages.
        status: HTTP status; 0 when there was no response.
        code: from the store's error document.
        transient: a retry may succeed.
    """

    text: str
    status: int = 0
    code: str = ""
    transient: bool = False


class StatusError(Exception):
    """A response of an object store with an error status."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status, self.code, self.message = status, code, message


class ShortBodyError(Exception):
    """A response with fewer bytes than it announced."""


class GaveUpError(OSError):
    """All `attempts` of a call failed, in `seconds`; `last` describes the last failure."""

    def __init__(self, attempts: int, seconds: float, last: Failure) -> None:
        made = f"{attempts} attempt{'' if attempts == 1 else 's'}"
        super().__init__(f"gave up after {made} in {seconds:.1f} s, the last error: {last.text}")
        self.attempts, self.seconds, self.last = attempts, seconds, last


def call_with_retries(name: str, attempt: Callable[[float], T], retry: Retry, extra_s: float = 0.0) -> T:
    """Call `attempt`, again after transient errors, and return its result.

    Args:
        name: of the object, for the log.
        attempt: function of the seconds that are left, within which it must return.
        retry: the policy.
        extra_s: seconds in addition to the policy's budget.

    Raises:
        GaveUpError: the errors were transient, but the attempts or the budget are exhausted.
        Exception: any other error of `attempt`.
    """
    began = time.monotonic()
    deadline = began + retry.budget_s + extra_s
    wait, attempts = retry.first_wait_s, 0
    while True:
        attempts += 1
        try:
            return attempt(max(deadline - time.monotonic(), 1e-3))
        except Exception as error:
            failure = describe(error)
            if not failure.transient:
                raise
            now, pause = time.monotonic(), wait * random.uniform(0.5, 1)
            if attempts >= retry.attempts or now + pause >= deadline:
                raise GaveUpError(attempts, now - began, failure) from error
            level = logging.INFO if attempts < 3 else logging.WARNING
            text = "%s: %s; attempt %d of %d in %.1f s"
            _log.log(level, text, name, failure.text, attempts + 1, retry.attempts, pause)
        time.sleep(pause)
        wait = min(2 * wait, retry.longest_wait_s)


_TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
_TRANSIENT_CODES = {
    "IncompleteBody",
    "InternalError",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
}
_TRANSIENT_ERRNO = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN}
# By name: these libraries take long to import and need not be installed.
_TRANSIENT_ERRORS = {
    "aiohttp.client_exceptions.ClientError",
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.CredentialRetrievalError",
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.IncompleteReadError",
    "botocore.parsers.ResponseParserError",
    "urllib3.exceptions.HTTPError",
}


def describe(error: BaseException) -> Failure:
    """Describe an error of any client.

    Its causes are examined, too: fsspec's file systems raise their own errors from those of their client.
    """
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__
    for each in causes:
        if response := _response(each):
            status, code, message = response
            named = code and not code.isdecimal()
            transient = status in _TRANSIENT_STATUS or code in _TRANSIENT_CODES
            return Failure(f"{status} {code if named else message}".strip(), status, code if named else "", transient)
    names = {f"{kind.__module__}.{kind.__qualname__}" for each in causes for kind in type(each).__mro__}
    text = str(error) or type(error).__name__
    if any(isinstance(each, ssl.SSLCertVerificationError) for each in causes) or "CERTIFICATE_VERIFY_FAILED" in text:
        return Failure(text)
    if isinstance(error, TimeoutError) and not error.args:
        text = "no response in time"
    transient = bool(names & _TRANSIENT_ERRORS) or any(
        isinstance(
            each,
            ConnectionError
            | TimeoutError
            | ShortBodyError
            | http.client.HTTPException
            | socket.gaierror
            | ssl.SSLError,
        )
        or (isinstance(each, OSError) and each.errno in _TRANSIENT_ERRNO)
        for each in causes
    )
    return Failure(text, transient=transient)


class _Response(NamedTuple):
    """The parts of an error response that decide if it is transient."""

    status: int
    code: str
    message: str


def _response(error: BaseException) -> _Response | None:
    """The response of the store that caused an error, if there was one."""
    if isinstance(error, StatusError):
        return _Response(error.status, error.code, error.message)
    response = getattr(error, "response", None)
    if isinstance(response, Mapping) and "ResponseMetadata" in response:  # botocore's ClientError
        document = response.get("Error", {})
        status = response["ResponseMetadata"].get("HTTPStatusCode", 0)
        return _Response(int(status), str(document.get("Code", "")), str(document.get("Message", "")))
    if not type(error).__module__.startswith("aiohttp.http_"):  # its code 400 means an unreadable response
        for name in ("status", "status_code", "code"):  # clients of other stores
            status = getattr(error, name, None)
            if isinstance(status, int) and 400 <= status < 600:
                return _Response(status, "", str(error))
    return None
