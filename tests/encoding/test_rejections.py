"""Faults of the content are rejections; faults of the place end the job, or are looked for again by the next run."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from rdm_scale.encoding.inputs import find_media
from rdm_scale.encoding.job import EncodingJob, ProcessRank
from rdm_scale.encoding.pixels import read_metadata
from rdm_scale.encoding.rejections import Rejection, RejectionPolicy
from rdm_scale.encoding.repeats import remaining
from rdm_scale.encoding.runner import encode
from rdm_scale.errors import DataError, StorageError
from rdm_scale.storage.location import Location
from tests.support.encoding_jobs import contents, make_job, write_clips, write_digits
from tests.support.media_files import RED

COUNT = 30


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, COUNT)
    return folder


class Store:
    """Objects in memory, of which some cannot be read."""

    def __init__(self, folder: Location, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.failing: dict[str, Exception] = {}  # by name
        read, failing = MemoryFileSystem.cat_file, self.failing

        def cat_file(self: MemoryFileSystem, path: str, **options: Any) -> bytes:
            if error := failing.get(path.rsplit("/", 1)[-1]):
                raise error
            return read(self, path, **options)

        monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)


@pytest.fixture
def store(digits: Path, memory: Location, monkeypatch: pytest.MonkeyPatch) -> Store:
    fs = fsspec.filesystem("memory")
    for path in sorted(digits.rglob("*.png")):
        fs.pipe_file(f"{memory.path}/in/{path.name}", path.read_bytes())
    return Store(memory / "in", monkeypatch)


def said(file: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (file / "rejected.jsonl").read_text().splitlines()]
    return {line["input"].rsplit("/", 1)[-1]: line["cause"] for line in lines}


@pytest.mark.parametrize(
    "error", [PermissionError("403 Forbidden"), OSError("500 after all attempts"), FileNotFoundError("vanished")]
)
def test_a_failure_of_the_storage_ends_the_job_which_goes_on_later(
    store: Store, tmp_path: Path, error: Exception
) -> None:
    store.failing["00007.png"] = error
    out = tmp_path / "out"
    with pytest.raises(
        StorageError, match=r"cannot read .*00007\.png.*not a damaged input: run the same command again"
    ):
        encode(make_job(store.folder, out, max_rejected=0.5))
    assert not (out / "manifest.json").exists() and not (out / "rejected.jsonl").exists()
    store.failing.clear()
    encoded = encode(make_job(store.folder, out, max_rejected=0.5))
    assert encoded is not None and encoded.train.samples == COUNT and encoded.train.rejected == 0


def test_an_allowed_share_is_left_out_and_looked_for_again(store: Store, tmp_path: Path) -> None:
    out, lines = tmp_path / "out", []
    encode(make_job(store.folder, tmp_path / "whole"))
    store.failing["00007.png"] = PermissionError("403 Forbidden")
    (store.folder / "00008.png").write(b"no image")

    def job() -> EncodingJob:
        return make_job(store.folder, out, max_rejected=0.04, max_unreadable=0.04)

    encoded = encode(job())
    assert encoded is not None and encoded.train.samples == COUNT - 2 and encoded.train.rejected == 2
    assert said(out) == {"00007.png": "storage", "00008.png": "content"}
    before = contents(out)
    assert remaining(job(), ProcessRank(), lines.append) == "nothing" and contents(out) == before
    store.failing.clear()
    assert remaining(job(), ProcessRank(1, 2), lines.append) == "nothing" and contents(out) == before
    assert remaining(job(), ProcessRank(), lines.append) == "alone" and not (out / "manifest.json").exists()
    again = encode(job())
    assert again is not None and again.train.samples == COUNT - 1 and said(out) == {"00008.png": "content"}
    assert "can be read now" in lines[1] and lines[0].endswith("complete already, nothing to do")


def test_more_than_the_allowed_share_ends_the_job_early(store: Store, tmp_path: Path) -> None:
    store.failing |= {f"{i:05d}.png": PermissionError("403 Forbidden") for i in range(10)}
    with pytest.raises(StorageError, match=r"4 inputs could not be read, more than a share of 0\.1"):
        encode(make_job(store.folder, tmp_path / "out", max_unreadable=0.1))


def test_unreadable_videos_are_no_damaged_videos(tmp_path: Path) -> None:
    write_clips(tmp_path / "in", 3)
    job = make_job(tmp_path / "in", tmp_path / "out", 16, frames=5, max_rejected=0.5)
    (tmp_path / "in/1.mp4").unlink()
    with pytest.raises(StorageError, match=r"cannot read .*1\.mp4"):
        encode(job)
    assert not (tmp_path / "out/.encoding/plan.json").exists()
    allowed = make_job(tmp_path / "in", tmp_path / "out", 16, frames=5)
    assert encode(allowed) is not None


def test_a_read_that_fails_in_the_middle_of_a_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg takes a failing read for the end of the file, or for damage."""
    write_clips(tmp_path / "in", 1)
    (file,) = find_media(str(tmp_path / "in")).files
    content = file.location.read()
    for end in (100, len(content) // 2, len(content) - 50):

        class Failing(io.BytesIO):
            def read(self, size: int | None = -1) -> bytes:
                if self.tell() + (size or 0) > end:  # noqa: B023
                    raise TimeoutError("no byte arrived for 10 s")
                return super().read(size)

        monkeypatch.setattr(Location, "open", lambda self, mode="rb", kind=Failing: kind(content))
        with pytest.raises(StorageError, match=r"cannot read .*0\.mp4: no byte arrived for 10 s"):
            read_metadata(file, "video", None)


def test_a_file_that_changes_while_a_job_runs_ends_it(digits: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    shutil.copytree(digits, source)
    job = make_job(source, tmp_path / "out", max_rejected=0.5)
    next(source.rglob("*.png")).write_bytes(RED)
    with pytest.raises(StorageError, match="was changed while it was in use"):
        encode(job)


def test_reasons_name_the_file_and_repeat(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(RED)
    (file,) = find_media(str(tmp_path)).files
    policy = RejectionPolicy(10, 0.1)
    odd = f"cannot identify {object()!r} and {io.BytesIO()!r}"
    reason, cause = policy.reject(DataError(odd), file)
    assert reason == f"{file.name}: cannot identify <object> and <_io.BytesIO>" and cause == "content"
    assert policy.reject(DataError(f"{file.name} is odd"), file) == Rejection(f"{file.name} is odd")
    assert policy.reject(StorageError("gone"), file) == Rejection(f"{file.name}: gone", "storage")
    assert policy.reject(StorageError("gone"), file).cause == "storage"  # one input, however many views of it
