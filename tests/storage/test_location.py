"""Locations on the local disk and in memory, which represents object stores."""

import errno
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from rdm_scale.errors import ConfigError
from rdm_scale.storage.location import Location, ReplacedError, Retry, retrying
from rdm_scale.storage.retries import describe


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


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [(0, 3, b"012"), (4, 4, b"4567"), (8, 5, b"89"), (10, 1, b""), (99, 3, b""), (3, 0, b"")],
)
def test_range_is_cut_at_the_end_of_the_file(folder: Location, offset: int, length: int, expected: bytes) -> None:
    (folder / "a").write(b"0123456789")
    assert (folder / "a").read_range(offset, length) == expected


def test_missing_files_raise(folder: Location) -> None:
    for read in (Location.size, Location.stat, Location.read, Location.open, lambda place: place.read_range(0, 1)):
        with pytest.raises(FileNotFoundError):
            read(folder / "missing")


def test_folder_lists_sizes_and_versions_of_its_files(folder: Location) -> None:
    (folder / "a").write(b"12")
    (folder / "below").make_dir()
    (folder / "below" / "b").write(b"345")
    before = folder.stats()
    assert {name: found.bytes for name, found in before.items()} == {"a": 2}
    assert {name: found.bytes for name, found in folder.find().items()} == {"a": 2, "below/b": 3}
    assert before == {"a": (folder / "a").stat()} == folder.stats()
    (folder / "a").write(b"21")
    assert folder.stats()["a"] != before["a"] and folder.stats()["a"] == (folder / "a").stat()
    assert (folder / "nosuch").stats() == (folder / "nosuch").find() == (folder / "a").stats() == {}
    with pytest.raises(IsADirectoryError):
        folder.stat()


def test_links_are_their_targets(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"123")
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder", "nothing"):
        (tmp_path / "folder" / f"to {name}").symlink_to(tmp_path / name)
    assert Location(tmp_path / "folder").stats() == {"to file": Location(tmp_path / "file").stat()}


def test_file_that_is_open_can_be_read_in_any_order(folder: Location) -> None:
    (folder / "a").write(bytes(range(256)) * 100)
    with (folder / "a").open() as file:
        assert file.read(3) == b"\x00\x01\x02" and file.seek(-1, 2) == 25_599
        assert file.read() == b"\xff" and file.read() == b"" and file.seek(256) == 256
        assert file.read() == bytes(range(256)) * 99
        with pytest.raises((ValueError, OSError)):
            file.seek(-1)


def test_file_has_no_entries(folder: Location) -> None:
    (folder / "a").write(b"x")
    assert (folder / "a").names() == []


def test_local_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    place = Location(tmp_path) / "a"
    place.write(b"old")
    with pytest.raises(TypeError):
        place.write("text, not bytes")  # type: ignore[arg-type]
    assert place.read() == b"old" and place.parent.names() == ["a"]


def test_local_write_replaces_the_file_rather_than_its_content(tmp_path: Path) -> None:
    """A reader that has the old file open keeps reading the old content."""
    place = Location(tmp_path) / "a"
    place.write(b"old")
    with (tmp_path / "a").open("rb") as file:
        place.write(b"newer")
        assert file.read() == b"old"
    assert stat.S_ISREG((tmp_path / "a").stat().st_mode) and place.read() == b"newer"


def test_other_paths_of_the_same_file_system(folder: Location) -> None:
    for name in ("1.tar", "2.tar", "other"):
        (folder / name).write(name.encode())
    assert [place.name for place in (folder / "*.tar").glob()] == ["1.tar", "2.tar"]
    for path in (f"{folder.path}/other", str(folder / "other"), f"{folder.schemes[0]}://{folder.path}/other"):
        assert folder.at(path).read() == b"other" and folder.at(path).fs is folder.fs
    assert Location(f"{folder.path}/other", folder.fs).read() == b"other"


def test_location_can_be_sent_to_another_process(folder: Location) -> None:
    (folder / "a").write(b"1")
    assert pickle.loads(pickle.dumps(folder / "a")).read() == b"1"


def test_only_the_local_disk_is_local(tmp_path: Path, memory: Location) -> None:
    assert Location(tmp_path).is_local and Location(f"file://{tmp_path}").is_local
    assert not memory.is_local
    assert not Location("filecache::memory://somewhere").is_local  # its protocol has "file" in its name


@pytest.mark.parametrize("url", ["nosuch://bucket/set", "nosuch::memory://x"])
def test_unknown_file_system_is_a_configuration_error(url: str) -> None:
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


class Failing:
    """A method of a file system that fails a number of times."""

    def __init__(self, error: Exception, times: float) -> None:
        self.error, self.times, self.calls = error, times, 0

    def __call__(self, fs: object, path: str, **options: Any) -> bytes:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return b"content"


QUICK = Retry(attempts=3, budget_s=10, first_wait_s=0.001, longest_wait_s=0.001)


@pytest.mark.parametrize(
    "error", [ConnectionResetError(), TimeoutError(), OSError(errno.ENETUNREACH, "Network is unreachable")]
)
def test_transient_errors_are_retried(error: OSError, monkeypatch: pytest.MonkeyPatch, memory: Location) -> None:
    with retrying(QUICK):
        failing = Failing(error, 2)
        monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda *a, **o: failing(*a, **o))
        assert memory.read() == b"content" and failing.calls == 3
        failing.calls, failing.times = 0, 3
        message = r"could not be read: gave up after 3 attempts in 0\.\d s, the last error: .*later"
        with pytest.raises(OSError, match=message):
            memory.read()


@pytest.mark.parametrize("error", [PermissionError(), FileNotFoundError(), OSError(errno.EIO, "I/O"), ValueError("?")])
def test_permanent_errors_are_not_retried(error: Exception, monkeypatch: pytest.MonkeyPatch, memory: Location) -> None:
    failing = Failing(error, 1)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda *a, **o: failing(*a, **o))
    with retrying(QUICK), pytest.raises(OSError, match=str(memory)) as raised:
        memory.read()
    assert failing.calls == 1 and (type(raised.value) is type(error) or isinstance(error, ValueError))


def test_local_calls_are_never_retried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failing = Failing(ConnectionResetError("as if"), 1)
    monkeypatch.setattr(LocalFileSystem, "exists", lambda *a, **o: failing(*a, **o))
    with pytest.raises(ConnectionResetError):
        Location(tmp_path).exists()
    assert failing.calls == 1


def test_the_waits_double_and_the_budget_ends_them(monkeypatch: pytest.MonkeyPatch, memory: Location) -> None:
    now, waits = [100.0], []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        now[0] += seconds

    monkeypatch.setattr("rdm_scale.storage.retries.time.sleep", sleep)
    monkeypatch.setattr("rdm_scale.storage.retries.time.monotonic", lambda: now[0])
    monkeypatch.setattr("rdm_scale.storage.retries.random.uniform", lambda low, high: high)
    failing = Failing(TimeoutError(), 99)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda *a, **o: failing(*a, **o))
    with (
        retrying(Retry(attempts=99, budget_s=10, first_wait_s=0.5, longest_wait_s=3)),
        pytest.raises(OSError, match=r"6 attempts in 9\.5 s, the last error: no response in time"),
    ):
        memory.read()
    assert waits == [0.5, 1, 2, 3, 3]  # the next would end after the budget


def test_status_of_an_error_of_another_client() -> None:
    class HttpError(Exception):
        code = 503

    assert describe(HttpError("busy")).transient and describe(HttpError("busy")).status == 503
    HttpError.code = 403
    assert not describe(HttpError("no")).transient
    wrapped = OSError("wrapped")
    wrapped.__cause__ = ConnectionResetError()
    assert describe(wrapped).transient


def test_large_local_ranges_are_read_completely(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Linux reads at most 2 GiB at once."""
    (tmp_path / "a").write_bytes(b"0123456789")
    preadv, reads = os.preadv, []

    def few_bytes(file: int, buffers: list[memoryview], offset: int) -> int:
        reads.append(offset)
        return preadv(file, [buffers[0][:3]], offset)

    monkeypatch.setattr(os, "preadv", few_bytes)
    assert (
        Location(tmp_path / "a").read_range(1, 8) == b"12345678"
        and Location(tmp_path / "a").read_range(5, 9) == b"56789"
    )
    assert reads == [1, 4, 7, 5, 8]


def test_a_folder_below_that_cannot_be_listed_is_an_error(memory: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk of fsspec itself leaves it out without a word."""
    for path in ("a/1", "b/2", "b/deep/3", ".git/4"):
        (memory / path).parent.make_dir()
        (memory / path).write(b"x")
    walk = memory.walk()
    assert list(walk.files) == ["a/1", "b/2", "b/deep/3"] and walk.others == {".git": "hidden folders"}
    list_folder = MemoryFileSystem.ls

    def refuse(self: MemoryFileSystem, path: str, *arguments: Any, **options: Any) -> Any:
        if path.endswith("/deep"):
            raise PermissionError(f"{path}: no access")
        return list_folder(self, path, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "ls", refuse)
    with pytest.raises(PermissionError, match="b/deep"):
        memory.walk()


def test_a_range_of_another_version_is_refused(tmp_path: Path) -> None:
    file = Location(tmp_path / "a")
    file.write(b"0123")
    version = file.stat().version
    assert file.read_range(1, 2, version) == b"12"
    os.utime(tmp_path / "a", ns=(0, 0))
    with pytest.raises(ReplacedError, match=f"{tmp_path}/a is no longer version {version}"):
        file.read_range(1, 2, version)


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK])
def test_a_new_file_is_written_where_there_are_no_hard_links(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("os.link", refuse)
    file = Location(tmp_path / "owner.json")
    file.write_if(b"mine", None)
    with pytest.raises(ReplacedError, match=r"owner\.json exists already"):
        file.write_if(b"another's", None)
    assert file.read() == b"mine" and Location(tmp_path).names() == ["owner.json"]
