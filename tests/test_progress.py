"""Progress reports on a pseudo-terminal and in a pipe."""

import contextlib
import fcntl
import os
import pty
import struct
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from rdm_scale.progress import ProgressReporter, track


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def log(tmp_path: Path) -> Iterator[TextIO]:
    with (tmp_path / "log").open("w+") as stream:
        yield stream


def lines(log: TextIO) -> list[str]:
    log.seek(0)
    return log.read().splitlines()


def test_a_pipe_gets_a_line_every_few_seconds_the_first_soon_and_the_last_always() -> None:
    read, write = os.pipe()
    clock = Clock()
    with os.fdopen(write, "w") as stream, ProgressReporter("training", 400, "step", stream=stream, clock=clock) as it:
        for _ in range(400):  # 50 seconds
            clock.now += 0.125
            it.update(mse="0.5")
    with os.fdopen(read) as stream:
        text = stream.read()
    found = text.splitlines()
    assert "\r" not in text
    assert len(found) == 11
    assert found[0] == "training: 8/400 steps, 8 steps/s, 00:49 left, mse 0.5"
    assert found[1] == "training: 48/400 steps, 8 steps/s, 00:44 left, mse 0.5"
    assert found[-1] == "training: 400/400 steps, 8 steps/s, 00:50 in all, mse 0.5"


def test_a_terminal_gets_a_bar_with_the_time_left() -> None:
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with os.fdopen(inner, "w") as stream, ProgressReporter("drawing", 4, "sample", stream=stream) as progress:
        progress.update()
        progress.advance_to(4)
        progress.advance_to(3)
        assert progress.done == 4
    text = ""
    with contextlib.suppress(OSError):  # EIO: all was read, and the other end is closed
        while True:
            text += os.read(outer, 100_000).decode()
    os.close(outer)
    assert "\r" in text
    assert "drawing: 100%" in text
    assert "4/4" in text
    assert "sample/s" in text
    assert "<" in text  # time left


def test_quick_work_gets_one_line(log: TextIO) -> None:
    with ProgressReporter("verifying", unit="B", scaled=True, stream=log, clock=Clock()) as progress:
        progress.update(2_500_000)
        progress.update(2_500_000)
    assert lines(log) == ["verifying: 5.00MB"]


def test_what_was_done_earlier_does_not_count_towards_the_rate(log: TextIO) -> None:
    clock = Clock()
    with ProgressReporter("encoding", 3000, initial=1000, stream=log, clock=clock) as progress:
        clock.now += 2
        progress.advance_to(1500)
        progress.advance_to(1200)
    assert lines(log) == ["encoding: 1,500/3,000 samples, 250 samples/s, 00:06 left"]


def test_a_total_that_is_known_late(log: TextIO) -> None:
    with ProgressReporter("drawing", stream=log, clock=Clock()) as progress:
        progress.advance_to(2, 8)
    assert lines(log) == ["drawing: 2/8 samples"]


def test_work_that_fails_says_how_far_it_came(log: TextIO) -> None:
    with pytest.raises(OSError), ProgressReporter("writing", 3, "tensor", stream=log, clock=Clock()) as progress:
        progress.update()
        raise OSError
    assert lines(log) == ["writing: 1/3 tensors"]


def test_a_silent_rank_writes_nothing(log: TextIO) -> None:
    with ProgressReporter("encoding", 1, shown=False, stream=log) as progress:
        progress.update()
    assert progress.done == 1
    assert lines(log) == []


def test_nothing_done_is_not_reported(log: TextIO) -> None:
    ProgressReporter("encoding", 10, stream=log).close()
    assert lines(log) == []


def test_track_reports_every_item(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(["a", "b"], "drawing", "figure")) == ["a", "b"]
    assert capsys.readouterr().err.startswith("drawing: 2/2 figures")
