"""The local disk as a storage backend."""

import errno
import os
from contextlib import suppress
from pathlib import Path
from stat import S_ISDIR
from threading import get_ident
from typing import IO, Any, ClassVar, NamedTuple, cast

from rdm_scale.storage.backend import (
    BROKEN_LINK,
    CYCLIC_LINK,
    HIDDEN_FOLDER,
    SPECIAL_FILE,
    ReplacedError,
    Stat,
    StorageBackend,
    Walk,
    check_version,
)

# What os.link says on file systems without hard links: FUSE mounts of object stores, SMB, exFAT.
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class LocalFiles(StorageBackend):
    """Files of this machine. Nothing is retried: errors of a local disk are not transient."""

    is_local: ClassVar[bool] = True

    def url(self, path: str) -> str:
        return path

    def stat(self, path: str) -> Stat:
        found = os.stat(path)  # noqa: PTH116
        if S_ISDIR(found.st_mode):
            raise IsADirectoryError(f"{path} is a folder, not a file")
        return _stat_of(found)

    def stats(self, path: str) -> dict[str, Stat]:
        found: dict[str, Stat] = {}
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(path) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # a dangling link
                    if entry.is_file():
                        found[entry.name] = _stat_of(entry.stat())
        return found

    def walk(self, path: str) -> Walk:
        files: dict[str, Stat] = {}
        others: dict[str, str] = {}
        if not Path(path).is_dir():
            return Walk(files, others)
        waiting = [_Folder("", (_identity(path),))]
        while waiting:
            folder = waiting.pop()
            with os.scandir(f"{path}/{folder.path}") as entries:
                for entry in entries:
                    below = f"{folder.path}/{entry.name}".lstrip("/")
                    if entry.is_file():
                        files[below] = _stat_of(entry.stat())
                    elif not entry.is_dir():
                        others[below] = BROKEN_LINK if entry.is_symlink() else SPECIAL_FILE
                    elif entry.name.startswith("."):
                        others[below] = HIDDEN_FOLDER
                    elif (identity := _identity(entry.path)) in folder.around:
                        others[below] = CYCLIC_LINK
                    else:
                        waiting.append(_Folder(below, (*folder.around, identity)))
        return Walk(dict(sorted(files.items())), dict(sorted(others.items())))

    def read(self, path: str) -> bytes:
        with open(path, "rb") as file:  # noqa: PTH123
            return file.read()

    def read_range(self, path: str, offset: int, length: int, version: str | None) -> bytes:
        found = self.stat(path)
        check_version(path, found, version)
        content = bytearray(min(length, max(0, found.bytes - offset)))  # `length` may be far too large
        return bytes(memoryview(content)[: self.read_into(path, offset, memoryview(content))])

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            done = 0
            while done < len(buffer):  # Linux reads less than 2 GiB per call
                more = os.preadv(descriptor, [buffer[done:]], offset + done)
                if not more:
                    break
                done += more
            return done
        finally:
            os.close(descriptor)

    def open(self, path: str, mode: str) -> IO[bytes]:
        return cast(IO[bytes], self._call(path, "open", mode=mode))

    def write_if(self, path: str, content: bytes, version: str | None) -> None:
        if version is not None:
            super().write_if(path, content, version)
            return
        complete = Path(f"{path}.complete-{os.getpid()}-{get_ident()}")
        self.write(str(complete), content)
        try:
            os.link(complete, path)  # fails if the file exists, also if another process is about to create it
        except FileExistsError:
            raise ReplacedError(f"{path} exists already") from None
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            _create(path, content)
        finally:
            complete.unlink()

    def write(self, path: str, content: bytes) -> None:
        unfinished = Path(f"{path}.partial-{os.getpid()}-{get_ident()}")
        try:
            with unfinished.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise

    def remove(self, path: str) -> None:
        self._call(path, "rm", recursive=True)

    def _call(self, path: str, method: str, **options: Any) -> Any:
        try:
            return getattr(self.fs, method)(path, **options)
        except OSError:
            raise
        except Exception as error:  # fsspec's own
            raise OSError(f"{method} of {path} failed: {type(error).__name__}: {error}") from error


def _create(path: str, content: bytes) -> None:
    """Write a file that must not exist yet. Unlike with a link, others may see it before it is complete."""
    try:
        file = open(path, "xb")  # noqa: PTH123, SIM115
    except FileExistsError:
        raise ReplacedError(f"{path} exists already") from None
    try:
        with file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        Path(path).unlink(missing_ok=True)
        raise


class _Folder(NamedTuple):
    """A folder to be listed."""

    path: str  # relative to the folder that is walked
    around: tuple[tuple[int, int], ...]  # device and inode of it and of the folders that it lies in


def _identity(folder: str) -> tuple[int, int]:
    found = os.stat(folder)  # noqa: PTH116
    return found.st_dev, found.st_ino


def _stat_of(found: os.stat_result) -> Stat:
    return Stat(found.st_size, str(found.st_mtime_ns))
