"""Processes that end with the process that started them."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.limits import HANG_S

PARENT = """
import subprocess, time
from rdm_scale.parent_death import parent_death_setter
child = subprocess.Popen(["sleep", "3000"], preexec_fn=parent_death_setter())
print(child.pid, flush=True)
time.sleep(3000)
"""


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="the signal is Linux's")
def test_a_child_is_killed_with_its_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert is_running(child)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + HANG_S
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(child)
