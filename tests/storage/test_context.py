"""The process-wide storage settings: overrides of the retry policy, and shared S3 clients."""

import threading

import pytest

from rdm_scale.storage.context import StorageContext, current_retry, retrying, set_retry
from rdm_scale.storage.retries import Retry
from tests.support.limits import HANG_S

QUICK, SLOW = Retry(attempts=3), Retry(attempts=30)


def test_policy_can_be_set_and_overridden() -> None:
    before = current_retry()
    set_retry(QUICK)
    try:
        assert current_retry() is QUICK
        with retrying(Retry()):
            assert current_retry() == Retry()
        assert current_retry() is QUICK
    finally:
        set_retry(before)


def test_running_threads_see_a_change() -> None:
    """Readers' threads live longer than the settings that they were started under."""
    context = StorageContext()
    changed, seen = threading.Event(), list[Retry]()

    def work() -> None:
        changed.wait(HANG_S)
        seen.append(context.retry)

    thread = threading.Thread(target=work)
    thread.start()
    context.retry = QUICK
    changed.set()
    thread.join()
    assert seen == [QUICK]


def test_overrides_may_end_in_any_order() -> None:
    """Two threads override the policy at the same time; neither leaves its own behind."""
    context = StorageContext()
    first, second = context.overriding(QUICK), context.overriding(QUICK)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert context.retry is QUICK
    with context.overriding(SLOW):
        second.__exit__(None, None, None)
        assert context.retry is SLOW
    assert context.retry == Retry()


def test_client_is_shared_until_the_environment_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    context = StorageContext()
    options = {"key": "a", "secret": "b"}
    client = context.s3_client(options)
    assert context.s3_client(dict(options)) is client
    assert context.s3_client(options | {"key": "c"}) is not client
    with context.overriding(Retry(stall_s=1)):  # clients adopt this limit when they are made
        assert context.s3_client(options) is not client
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://elsewhere")
    assert context.s3_client(options) is not client
