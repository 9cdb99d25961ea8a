"""Signals that ask a process to stop, received while its main thread is busy."""

import signal
import subprocess
import sys
import time

import pytest

from tests.support.limits import HANG_S

# The main thread is in a C call that does not return: a handler of Python would not run.
SCRIPT = """
import sys, threading
from rdm_scale.stop_request import StopRequest
stop = StopRequest()
stop.listen()
print("listening", flush=True)
{body}
"""
SAYS = """
import time
while not stop.requested: time.sleep(0.01)
print(stop.signal_name, stop.by_launcher, flush=True)
"""
BUSY = "import socket; a, b = socket.socketpair(); print(a.recv(1))"


def start(body: str) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", SCRIPT.format(body=body)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "listening\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_a_request(number: signal.Signals) -> None:
    process = start(SAYS)
    process.send_signal(number)
    assert process.communicate(timeout=HANG_S)[0] == f"{number.name} False\n" and process.returncode == 0


def test_a_second_signal_ends_at_once() -> None:
    process = start(BUSY)
    process.send_signal(signal.SIGUSR1)  # a warning does not count
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # the same request, delivered twice
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(HANG_S) == 128 + signal.SIGTERM
