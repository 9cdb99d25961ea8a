"""Locations on the local disk and on an object store's stand-in."""

import stat
from pathlib import Path

import pytest

from rdm_scale.data.storage import Location
from rdm_scale.errors import ConfigError


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, memory: Location) -> Location:
    place = Location(tmp_path / "folder") if request.param == "local" else memory
    place.make_dir()
    return place


def test_files_are_written_listed_read_and_removed(folder: Location) -> None:
    (folder / "b").write(b"0123456789")
    (folder / "a").write(b"")
    (folder / "b").write(b"9876543210")
    assert folder.names() == ["a", "b"]
    assert (folder / "b").size() == 10 and (folder / "b").read() == b"9876543210"
    assert (folder / "b").name == "b" and str((folder / "b").parent) == str(folder)
    assert Location(str(folder / "b")).read() == b"9876543210"
    (folder / "b").remove()
    assert folder.names() == ["a"] and not (folder / "b").exists()
    folder.remove()
    assert not folder.exists() and folder.names() == []


@pytest.mark.parametrize(("offset", "length", "expected"), [(0, 3, b"012"), (4, 4, b"4567"), (8, 5, b"89")])
def test_a_range_is_cut_at_the_end_of_the_file(folder: Location, offset: int, length: int, expected: bytes) -> None:
    (folder / "a").write(b"0123456789")
    assert (folder / "a").read_range(offset, length) == expected


def test_what_is_missing_raises(folder: Location) -> None:
    for read in (Location.size, Location.read, lambda place: place.read_range(0, 1)):
        with pytest.raises(FileNotFoundError):
            read(folder / "missing")


def test_a_file_has_no_entries(folder: Location) -> None:
    (folder / "a").write(b"x")
    assert (folder / "a").names() == []


def test_a_local_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    place = Location(tmp_path) / "a"
    place.write(b"old")
    with pytest.raises(TypeError):
        place.write("text, not bytes")  # type: ignore[arg-type]
    assert place.read() == b"old" and place.parent.names() == ["a"]


def test_a_local_write_replaces_the_file_rather_than_its_content(tmp_path: Path) -> None:
    """Who has the old file open goes on to see the old content, whole."""
    place = Location(tmp_path) / "a"
    place.write(b"old")
    with (tmp_path / "a").open("rb") as file:
        place.write(b"newer")
        assert file.read() == b"old"
    assert stat.S_ISREG((tmp_path / "a").stat().st_mode) and place.read() == b"newer"


def test_only_the_local_disk_is_local(tmp_path: Path, memory: Location) -> None:
    assert Location(tmp_path).is_local and Location(f"file://{tmp_path}").is_local
    assert not memory.is_local
    assert not Location("filecache::memory://somewhere").is_local  # its protocol has "file" in its name


@pytest.mark.parametrize("url", ["nosuch://bucket/set", "nosuch::memory://x"])
def test_an_unknown_file_system_is_a_mistake_of_the_configuration(url: str) -> None:
    with pytest.raises(ConfigError, match="nosuch"):
        Location(url)


def test_errors_of_a_client_are_os_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """s3fs passes botocore's errors on where there is no response, for instance without credentials."""
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(OSError, match=r"(?i)credentials"):
        Location("s3://bucket/manifest.json").read()
