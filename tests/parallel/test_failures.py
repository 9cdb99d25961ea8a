"""Exit codes of a rank, and which rank reports a failure."""

import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from rdm_scale.errors import CheckpointError, ConfigError, DataError, LaunchError, NonFiniteError
from rdm_scale.parallel.failures import FIRST_FAILURE_KEY, FailureReporter, exit_code
from rdm_scale.parallel.hosts import Hosts
from tests.support.limits import HANG_S

SCRIPT = """
import os
from rdm_scale.errors import ConfigError
from rdm_scale.parallel.failures import FIRST_FAILURE_KEY, run_main
def body(reporter):
    {setup}
    {body}
run_main(body)
"""


def end_of(body: str, setup: str = "pass", local_rank: int = 0) -> tuple[int, str]:
    code = SCRIPT.format(body=body, setup=setup)
    environment = {"LOCAL_RANK": str(local_rank), "RANK": str(local_rank)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_S)
    return done.returncode, done.stderr


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def test_success_is_silent() -> None:
    assert end_of("pass") == (0, "")


def test_a_users_error_is_one_line() -> None:
    assert end_of("raise ConfigError('set x')") == (2, "\nerror: set x\n")


def test_a_bug_keeps_its_traceback() -> None:
    code, message = end_of("1 / 0")
    assert code == 1 and "rank 0 failed" in message and "ZeroDivisionError" in message


def test_a_full_disk_is_one_line() -> None:
    code, message = end_of("raise OSError(28, 'No space left on device', 'runs/x/metrics.jsonl')")
    expected = (
        "there is no room to write runs/x/metrics.jsonl: No space left on device; make room, and the same command"
    )
    assert (code, message) == (2, f"\nerror: {expected} goes on\n")


def test_other_ranks_of_a_node_exit_silently() -> None:
    assert end_of("raise ConfigError('set x')", local_rank=1) == (2, "")


@pytest.mark.parametrize(("claimed_by", "reports"), [("", True), ("0", False)])
def test_with_a_common_store_the_first_rank_to_claim_reports(claimed_by: str, reports: bool) -> None:
    setup = "import torch.distributed as dist; reporter.store = dist.HashStore()"
    if claimed_by:
        setup += f"; reporter.store.set(FIRST_FAILURE_KEY, '{claimed_by}')"
    code, message = end_of("raise ConfigError('set x')", setup, local_rank=1)
    assert code == 2 and message == ("\nerror: set x\n" if reports else "")


@pytest.mark.parametrize(
    ("error", "training", "code"),
    [
        (ConfigError("x"), False, 2),
        (DataError("a damaged shard"), True, 2),
        (NonFiniteError("x"), True, 2),  # a restart would meet it again
        (LaunchError("ranks are missing"), False, 1),
        (CheckpointError("none there"), False, 2),
        (CheckpointError("cannot write"), True, 1),  # the place had worked before
        (ZeroDivisionError(), True, 1),
        (caused_by(DataError("cannot read"), ConnectionResetError()), True, 1),
        (caused_by(DataError("cannot read"), FileNotFoundError()), True, 2),
        (caused_by(CheckpointError("cannot write"), OSError(28, "No space left on device")), True, 2),
    ],
)
def test_only_what_a_restart_may_mend_has_code_1(error: Exception, training: bool, code: int) -> None:
    assert exit_code(error, training=training) == code


def test_a_store_that_never_answers_does_not_hold_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a cut cable: the rank reports for its host instead of waiting for ever."""
    monkeypatch.setattr("rdm_scale.parallel.failures.STORE_S", 0.1)
    reporter, never = FailureReporter(), threading.Event()

    class Silent:
        def compare_set(self, *arguments: str) -> bytes:
            never.wait()
            return b""

    reporter.store = Silent()  # type: ignore[assignment]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not reporter.claim()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert reporter.claim()
    never.set()


def test_a_rank_answers_however_long_the_run_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait for a failure ends with an error after `WAIT_S`; the rank waits again until the store has gone."""
    monkeypatch.setattr("rdm_scale.parallel.failures.WAIT_S", 0.1)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    reporter = FailureReporter()
    reporter.watch(server, Hosts([]))
    (thread,) = [each for each in threading.enumerate() if each.name == "failures"]
    time.sleep(0.5)
    server.set(FIRST_FAILURE_KEY, "1")
    server.wait(["rdm_scale/answers"], timedelta(seconds=HANG_S))
    assert server.get("rdm_scale/answers").startswith(b"0|")
    time.sleep(0.3)  # the wait for the verdict is as patient
    assert thread.is_alive()
    del server, reporter.store
    thread.join(HANG_S)
    assert not thread.is_alive()
