"""Directory of checkpoints: saving and removal are atomic, whatever interrupts them."""

import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from rdm_scale.checkpoint.directory import CheckpointDirectory, is_checkpoint, open_checkpoint, read_state
from rdm_scale.checkpoint.format.index import FileRecord
from rdm_scale.checkpoint.format.slices import Region, SliceTable, TensorSlice
from rdm_scale.checkpoint.format.writer import write_tensors
from rdm_scale.errors import CheckpointError, IncompleteError
from rdm_scale.storage.location import Location

SHAPE = (6, 4)


def write(directory: CheckpointDirectory, step: int, elements: int = 0) -> list[FileRecord]:
    """Write the files of two ranks, of a tensor whose elements are all `step`."""
    shape = (2, elements // 2) if elements else SHAPE
    records = []
    for rank in range(2):
        half = Region((rank * shape[0] // 2, 0), (shape[0] // 2, shape[1]))
        values = torch.full((half.numel,), float(step))
        records += write_tensors(
            directory.folder(step), rank, SliceTable.of([TensorSlice("w", shape, half, 0)]), {"ema": values}
        )
    return records


def save(directory: CheckpointDirectory, step: int) -> None:
    directory.begin(step)
    directory.commit(step, {"step": step, "seed": 3}, write(directory, step))


def assert_intact(directory: CheckpointDirectory, step: int) -> None:
    state, reader = directory.open(step)
    assert state == {"step": step, "seed": 3}
    assert torch.equal(reader.read("ema", "w"), torch.full(SHAPE, float(step)))


@pytest.fixture(params=["local", "memory"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointDirectory:
    if request.param == "local":
        return CheckpointDirectory(Location(tmp_path / "run" / "checkpoints"))
    return CheckpointDirectory(Location(f"memory://{tmp_path}/checkpoints"))


@pytest.fixture
def local(tmp_path: Path) -> CheckpointDirectory:
    return CheckpointDirectory(Location(tmp_path))


def test_only_complete_checkpoints_count(directory: CheckpointDirectory) -> None:
    assert (directory.steps(), directory.latest()) == ([], None)
    for step in (100, 20, 3):
        save(directory, step)
    write(directory, 400)
    (directory.root / "step_notes").make_dir()
    (directory.root / "step_00000500").write(b"a file")
    assert (directory.steps(), directory.latest()) == ([3, 20, 100], 100)
    assert directory.folder(100).name == "step_00000100"
    for step in (3, 20, 100):
        assert_intact(directory, step)
    assert read_state(directory.folder(20))["step"] == 20
    assert not is_checkpoint(directory.folder(400))


def test_incomplete_and_missing_checkpoints_are_distinguished(directory: CheckpointDirectory) -> None:
    write(directory, 7)
    with pytest.raises(CheckpointError, match=r"step_00000007 has no commit.json: .* interrupted"):
        directory.open(7)
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*step_00000008"):
        directory.open(8)


@pytest.mark.parametrize("version", [1, 3])
def test_another_version_is_refused_and_not_removed(local: CheckpointDirectory, version: int) -> None:
    for step in (1, 2, 3):
        save(local, step)
    commit = Path((local.folder(2) / "commit.json").path)
    commit.write_text(commit.read_text().replace('"version":2', f'"version":{version}'))
    message = rf"commit.json has version {version} of the format, and only version 2 is read"
    for refused in (
        lambda: local.open(2),
        lambda: is_checkpoint(local.folder(2)),
        local.steps,
        lambda: local.prune(3, 1),
    ):
        with pytest.raises(CheckpointError, match=message) as raised:
            refused()
        assert not isinstance(raised.value, IncompleteError)  # a run must not start again beside it
    assert local.newest() == (3, [])
    local.abandon(3)
    with pytest.raises(CheckpointError, match=message):
        local.newest()
    assert local.folder(1).exists() and commit.exists()


def test_a_killed_save_leaves_earlier_checkpoints(local: CheckpointDirectory) -> None:
    save(local, 1)
    child = os.fork()
    if child == 0:
        local.begin(2)
        write(local, 2)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert (local.folder(2) / "rank_00001.index.safetensors").exists()
    assert (local.steps(), local.latest()) == ([1], 1)
    assert_intact(local, 1)
    local.begin(2)
    assert local.folder(2).names() == []
    save(local, 2)
    assert_intact(local, 2)


def test_a_full_disk_leaves_earlier_checkpoints(local: CheckpointDirectory) -> None:
    save(local, 1)
    local.begin(2)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, unlimited[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*step_00000002.*; it needs 8,0\d\d,\d\d\d bytes"):
            write(local, 2, elements=4_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert local.latest() == 1
    local.abandon(2)
    assert local.root.names() == ["step_00000001"]
    assert_intact(local, 1)


def test_an_unwritable_directory_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot prepare .*file/step_00000001"):
        CheckpointDirectory(Location(tmp_path / "file")).begin(1)


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "rank_00001.index.safetensors", "state.json"])
def test_missing_bytes_are_found_on_opening(local: CheckpointDirectory, name: str) -> None:
    save(local, 1)
    path = Path((local.folder(1) / name).path)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=f"{name} has {len(content) - 1} bytes instead of {len(content)}"):
        local.open(1)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        local.open(1)


@pytest.mark.parametrize("name", ["state.json", "commit.json"])
def test_every_flipped_byte_is_found(local: CheckpointDirectory, name: str) -> None:
    save(local, 1)
    path = Path((local.folder(1) / name).path)
    content = path.read_bytes()
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(CheckpointError, match=f"{name}|is missing"):
            local.open(1)
    path.write_bytes(content)
    assert_intact(local, 1)


def test_a_hostile_commit_is_refused(local: CheckpointDirectory) -> None:
    save(local, 1)
    path = Path((local.folder(1) / "commit.json").path)
    for name in ("../../secret", "/etc/passwd", "", ".hidden", "a/b"):
        content = json.loads(path.read_text())
        content["files"][0]["name"] = name
        path.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=r"commit.json is damaged"):
            open_checkpoint(local.folder(1))
    path.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"commit.json is damaged"):
        open_checkpoint(local.folder(1))


def test_the_state_must_match_its_step_and_be_valid_json(local: CheckpointDirectory) -> None:
    local.begin(1)
    with pytest.raises(ValueError, match="of step 2, not 1"):
        local.commit(1, {"step": 2}, [])
    with pytest.raises(ValueError, match="JSON"):
        local.commit(1, {"step": 1, "loss": float("nan")}, [])
    assert local.steps() == []


def test_prune_keeps_the_newest(directory: CheckpointDirectory) -> None:
    for step in (1, 2, 3, 4, 5):
        save(directory, step)
    write(directory, 6)  # it may be being saved
    directory.prune(5, 0)
    assert directory.steps() == [1, 2, 3, 4, 5]
    directory.prune(5, 2, every=2)
    assert directory.steps() == [2, 4, 5]
    directory.prune(5, 2)
    assert directory.steps() == [4, 5]
    directory.prune(5, 9)
    assert directory.root.names() == ["step_00000004", "step_00000005", "step_00000006"]
    assert_intact(directory, 4)


def test_prune_leaves_what_is_later_than_the_step_just_saved(directory: CheckpointDirectory) -> None:
    """A run that found step 300 damaged goes on from 200: neither 200 nor 250 gives way to 300."""
    for step in (100, 200, 300):
        save(directory, step)
    (directory.folder(300) / "rank_00000.safetensors").write(b"")
    save(directory, 250)
    directory.prune(250, 2)
    assert directory.steps() == [200, 250, 300]
    directory.prune(250, 1)
    assert directory.steps() == [250, 300]
    assert_intact(directory, 250)


def test_prune_removes_what_interrupted_saves_left_and_nothing_else(directory: CheckpointDirectory) -> None:
    for step in (1, 3):
        write(directory, step)
    directory.prune(3, 1)
    assert directory.root.names() == [
        "step_00000001",
        "step_00000003",
    ]  # none is complete
    save(directory, 2)
    (directory.root / "step_1").make_dir()
    (directory.root / "step_1" / "mine").write(b"")
    (directory.root / "samples.png").write(b"")
    directory.prune(2, 1)
    assert directory.root.names() == ["samples.png", "step_00000002", "step_00000003", "step_1"]


def test_after_an_interrupted_removal_there_is_no_checkpoint(
    local: CheckpointDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save(local, step)
    remove = Location.remove

    def stop_at_folder(self: Location) -> None:
        if self.is_dir():
            raise OSError(5, "Input/output error")
        remove(self)

    monkeypatch.setattr(Location, "remove", stop_at_folder)
    with pytest.raises(CheckpointError, match=r"cannot remove .*step_00000001: Input/output error"):
        local.prune(2, 1)
    assert (local.folder(1) / "rank_00000.index.safetensors").exists()
    assert local.steps() == [2]


def test_the_newest_complete_checkpoint_is_found_with_reasons(local: CheckpointDirectory) -> None:
    for step in (1, 2, 3, 4):
        save(local, step)
    write(local, 5)
    Path((local.folder(4) / "rank_00001.safetensors").path).unlink()
    state = Path((local.folder(3) / "state.json").path)
    state.write_bytes(state.read_bytes().replace(b"3", b"4"))
    step, reasons = local.newest()
    assert step == 2 and len(reasons) == 3
    assert "step_00000005 has no commit.json" in reasons[0]
    assert "step_00000004/rank_00001.safetensors is missing" in reasons[1]
    assert "step_00000003/state.json is damaged" in reasons[2]


def test_an_unreadable_checkpoint_is_not_treated_as_missing(
    local: CheckpointDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a run would start again because a store did not answer."""
    save(local, 1)

    def no_answer(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Location, "read_range", no_answer)
    for look in (local.newest, local.latest, local.steps, lambda: is_checkpoint(local.folder(1))):
        with pytest.raises(CheckpointError, match=r"cannot read .*commit.json: Input/output error"):
            look()


def test_a_step_can_be_written_again(directory: CheckpointDirectory) -> None:
    save(directory, 1)
    directory.begin(1)
    assert directory.steps() == []
    save(directory, 1)
    assert_intact(directory, 1)
