"""Exit codes of a rank, and which rank reports a failure."""

import subprocess
import sys

import pytest

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


def test_success_is_silent() -> None:
    assert end_of("pass") == (0, "")


def test_a_users_error_is_one_line() -> None:
    assert end_of("raise ConfigError('set x')") == (1, "\nerror: set x\n")


def test_a_bug_keeps_its_traceback() -> None:
    code, message = end_of("1 / 0")
    assert code == 1 and "rank 0 failed" in message and "ZeroDivisionError" in message


def test_a_full_disk_is_one_line() -> None:
    code, message = end_of("raise OSError(28, 'No space left on device', 'runs/x/metrics.jsonl')")
    assert (code, message) == (1, "\nerror: there is no room to write runs/x/metrics.jsonl: No space left on device\n")


def test_other_ranks_of_a_node_exit_silently() -> None:
    assert end_of("raise ConfigError('set x')", local_rank=1) == (1, "")


@pytest.mark.parametrize(("claimed_by", "reports"), [("", True), ("0", False)])
def test_with_a_common_store_the_first_rank_to_claim_reports(claimed_by: str, reports: bool) -> None:
    setup = "import torch.distributed as dist; reporter.store = dist.HashStore()"
    if claimed_by:
        setup += f"; reporter.store.set(FIRST_FAILURE_KEY, '{claimed_by}')"
    code, message = end_of("raise ConfigError('set x')", setup, local_rank=1)
    assert code == 1 and message == ("\nerror: set x\n" if reports else "")
