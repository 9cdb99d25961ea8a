"""Bytes of one image or video: read at once, or as a file, from a file of its own or from a tar."""

import io
import tarfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from rdm_scale.encoding.inputs import find_media
from rdm_scale.errors import DataError, StorageError
from rdm_scale.storage.location import Location
from tests.support.media_files import MOVIE, RED, write_tar


def test_a_file_that_shrinks_after_it_was_found(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.png": RED})
    (image,) = find_media(str(tmp_path / "a.tar")).files
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:520])
    with pytest.raises(StorageError, match=r"a\.tar:1\.png was changed while it was in use"):
        image.read()
    with pytest.raises(StorageError, match=r"a\.tar:1\.png ends after 8 of"):  # where versions are not known
        replace(image, version="").read()


@pytest.mark.parametrize("inside", [True, False], ids=["in a tar", "a file"])
def test_open_is_a_file_of_exactly_these_bytes(tmp_path, inside):
    if inside:
        write_tar(tmp_path / "a.tar", {"0.mp4": b"before" * 999, "1.mp4": MOVIE, "2.mp4": b"behind" * 999})
    else:
        (tmp_path / "1.mp4").write_bytes(MOVIE)
    file = next(file for file in find_media(str(tmp_path)).files if file.key == "1")
    assert file.read() == MOVIE
    with file.open() as video:
        assert video.readable() and video.seekable() and not video.writable()
        assert video.read(10) == MOVIE[:10] and video.tell() == 10
        assert video.seek(-7, io.SEEK_END) == len(MOVIE) - 7
        assert video.read() == MOVIE[-7:] and video.read() == b""
        assert video.seek(300) == 300 and video.seek(-100, io.SEEK_CUR) == 200
        assert video.read(3000) == MOVIE[200:3200]
        assert video.seek(len(MOVIE) + 5) and video.read(4) == b""
        with pytest.raises((ValueError, OSError)):
            video.seek(-1)
        video.seek(0)
        assert video.read() == MOVIE
    assert video.closed
    (tmp_path / ("a.tar" if inside else "1.mp4")).write_bytes(b"")
    with pytest.raises(StorageError, match=r"1\.mp4 was changed while it was in use"):
        file.open()
    with pytest.raises(StorageError, match=r"1\.mp4 ends after 0 of"), replace(file, version="").open() as video:
        video.read()


def test_a_window_does_not_read_what_lies_around_it(tmp_path):
    """A tar of videos may be larger than the memory: a read must not cost more than what is asked for."""
    with (tmp_path / "a.tar").open("wb") as raw, tarfile.open(fileobj=raw, mode="w") as tar:
        info = tarfile.TarInfo("big.mp4")
        info.size = 2**36  # a hole on the disk
        raw.write(info.tobuf())
        raw.seek(info.size, io.SEEK_CUR)
        tar.offset = raw.tell()
        info = tarfile.TarInfo("small.mp4")
        info.size = len(MOVIE)
        tar.addfile(info, io.BytesIO(MOVIE))
    big, small = find_media(str(tmp_path / "a.tar")).files
    with big.open() as video:
        video.seek(2**35)
        assert video.read(1000) == bytes(1000)
    with small.open() as video:
        assert video.read() == MOVIE
    with pytest.raises(DataError, match="too large for an image"):
        big.read()


class FailingFile(io.BytesIO):
    """A file on a storage that fails."""

    def read(self, size: int | None = -1) -> bytes:
        raise TimeoutError("no byte arrived for 10 s")


def test_a_failing_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a decoder makes of it: it may hide the failure, or take it for the end of the file."""
    (tmp_path / "1.mp4").write_bytes(MOVIE)
    (file,) = find_media(str(tmp_path)).files
    monkeypatch.setattr(Location, "open", lambda self, mode="rb": FailingFile())
    with pytest.raises(StorageError, match=r"cannot read .*1\.mp4: no byte arrived"), file.opened() as content:
        with suppress(DataError):
            content.read()
        raise DataError("1.mp4 is damaged")
    with pytest.raises(StorageError, match="no byte arrived"), file.opened() as content, suppress(DataError):
        content.read()
