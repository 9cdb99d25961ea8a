"""status.json, and attempts of one launcher that are not to work again."""

import json
from pathlib import Path

import pytest

from rdm_scale.run_status import (
    STATUS,
    JobState,
    RunStatus,
    ended_under_this_launcher,
    read_status,
    replace_older_end,
)


def test_content(tmp_path: Path) -> None:
    RunStatus(JobState.STOPPED, step=7, checkpoint=5, host="node1", rank=3, reason="SIGTERM").write(tmp_path)
    content = json.loads((tmp_path / STATUS).read_text())
    expected = {"state": "stopped", "exit_code": 75, "step": 7, "checkpoint": 5, "host": "node1", "rank": 3}
    assert {name: content[name] for name in expected} == expected and content["reason"] == "SIGTERM"
    assert [path.name for path in tmp_path.iterdir()] == [STATUS]


def test_no_directory_is_made(tmp_path: Path) -> None:
    RunStatus(JobState.FAILED).write(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("state", "restarting", "ended"),
    [
        (JobState.STOPPED, False, JobState.STOPPED),
        (JobState.STOPPED, True, None),  # torchrun stops its ranks to start them on more nodes
        (JobState.USER_ERROR, False, JobState.USER_ERROR),
        (JobState.FAILED, False, None),
        (JobState.RUNNING, False, None),  # killed
    ],
)
def test_a_later_attempt_of_the_same_torchrun(
    state: JobState, restarting: bool, ended: JobState | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    RunStatus(state, restarting=restarting).write(tmp_path)
    assert ended_under_this_launcher(tmp_path) == ended  # the same parent process
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert ended_under_this_launcher(tmp_path) is None  # another torchrun with the same id: the user starts it again
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # rank 0 has moved to another node
    assert ended_under_this_launcher(tmp_path) == ended


@pytest.mark.parametrize("state", [JobState.STOPPED, JobState.USER_ERROR])
def test_the_end_of_an_earlier_launch_with_the_same_id(
    state: JobState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first attempt replaces it, so that the second one, on whatever node, does not take it for its own."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    RunStatus(state, step=7, checkpoint=5).write(tmp_path)
    monkeypatch.setattr("os.getppid", lambda: 1)
    replace_older_end(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert ended_under_this_launcher(tmp_path) is None
    status = read_status(tmp_path)
    assert (status["state"], status["step"], status["checkpoint"]) == ("running", 7, 5)
    RunStatus(state).write(tmp_path)  # its own end
    replace_older_end(tmp_path)
    assert ended_under_this_launcher(tmp_path) == state


def test_without_torchrun_every_start_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    RunStatus(JobState.STOPPED).write(tmp_path)
    assert ended_under_this_launcher(tmp_path) is None
