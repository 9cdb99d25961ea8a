"""Members of tar archives, with every byte of the file accounted for.

Python's `tarfile` takes a damaged header, and the end mark of the first of several joined archives, for the end of the
file. Here the first is an error, and joined archives are read on.
"""

import tarfile
from collections.abc import Iterator
from typing import IO

from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location

_BLOCK = tarfile.BLOCKSIZE
_CHUNK_BYTES = 2**20


def read_members(file: IO[bytes], location: Location, size: int) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar, or of several joined ones, in their order.

    The caller may read from the file while a member is handled.

    Args:
        file: the opened tar.
        location: of the tar, for error messages.
        size: of the file, in bytes.

    Raises:
        DataError: it is not a tar, is truncated, has a damaged header, or holds bytes that belong to no archive.
    """
    start, last = 0, ""
    try:
        while start < size or not start:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    yield member
                    last = member.name
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header it has read
                end = tar.offset
            start = _next_archive(file, location, size, end, last)
    except tarfile.TarError as error:
        raise DataError(f"{location} is not a tar file, or is damaged ({error}): copy it again") from None


def _next_archive(file: IO[bytes], location: Location, size: int, end: int, last: str) -> int:
    """Position after the end mark at `end` and its padding, where another archive begins, or the end of the file."""
    after = f"after the member {last!r}" if last else "at its beginning"
    if end + _BLOCK > size:
        raise DataError(f"{location} is truncated: it has no end-of-archive mark {after}; copy it again")
    file.seek(end)
    position = end
    while chunk := file.read(_CHUNK_BYTES):
        if used := chunk.lstrip(b"\0"):
            position += (len(chunk) - len(used)) // _BLOCK * _BLOCK
            break
        position += len(chunk)
    if position == end:
        raise DataError(
            f"{location} is damaged: the header at byte {end}, {after}, is not valid; copy it again, or write it anew"
        )
    if position < size:
        file.seek(position)
        try:
            tarfile.TarInfo.frombuf(file.read(_BLOCK), tarfile.ENCODING, "surrogateescape")
        except tarfile.TarError:
            raise DataError(
                f"{location} is damaged: {size - position} bytes behind the end-of-archive mark, from byte {position} "
                "on, belong to no archive; copy it again, or write it anew"
            ) from None
    return position
