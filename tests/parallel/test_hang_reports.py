"""Stacks of a process that makes no progress, and the variables of NCCL's flight recorder."""

import os
import time
from pathlib import Path

import pytest

from rdm_scale.parallel.hang_reports import HangWatch, record_collectives
from tests.support.limits import HANG_S


def test_a_rank_without_progress_writes_its_stacks(tmp_path: Path) -> None:
    path = tmp_path / "hangs" / "stacks_rank_00003.txt"
    with HangWatch(tmp_path, 3, timeout_s=0.05) as watch:
        watch.progress()
        deadline = time.monotonic() + HANG_S
        while not path.stat().st_size:
            assert time.monotonic() < deadline, "no stacks are written"
            time.sleep(0.01)
    assert "test_a_rank_without_progress_writes_its_stacks" in path.read_text()


def test_progress_puts_the_report_off_and_nothing_is_left(tmp_path: Path) -> None:
    with HangWatch(tmp_path, 0, timeout_s=HANG_S) as first, pytest.raises(KeyError):
        first.progress()
        with HangWatch(tmp_path, 1, timeout_s=HANG_S) as second:
            second.progress()
            assert len(list((tmp_path / "hangs").iterdir())) == 2
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "hangs").write_text("a file")
    with pytest.warns(UserWarning, match="a step that hangs leaves no stacks in .*hangs"):
        watch = HangWatch(tmp_path, 0, timeout_s=HANG_S).__enter__()
    watch.progress()
    watch.__exit__(None, None, None)
    assert (tmp_path / "hangs").read_text() == "a file"


def test_collectives_are_recorded_where_the_user_has_said_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DUMP_ON_TIMEOUT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "17")
    record_collectives(tmp_path)
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "17" and os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "hangs" / "collectives_rank_")
