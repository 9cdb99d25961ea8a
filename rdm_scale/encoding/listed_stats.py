"""Sizes and versions of files that a list names: a list itself does not say when they were changed.

Local files are looked up one by one. On object stores a folder of which many files are listed is listed once. Servers
behind http addresses are not asked: that takes a request per file, which many refuse.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from rdm_scale.encoding.media import MediaFile
from rdm_scale.storage.location import Location, Stat

_READERS = 32  # threads, which hide the latency of a store
_LISTED_AT_ONCE = 16  # files of one folder from which on the folder is listed
_LOCAL_AT_ONCE = 1024
_NOT_ASKED = frozenset({"http", "https"})


def with_stats(files: Sequence[MediaFile]) -> list[MediaFile]:
    """Fill in the size and version of each file, as far as they can be found out.

    A file that is missing, or that may not be looked up, stays as it is: reading it will tell.

    Raises:
        OSError: a store fails.
    """
    folders: dict[str, list[int]] = defaultdict(list)  # indices by folder
    for index, file in enumerate(files):
        if not _NOT_ASKED.intersection(file.location.schemes):
            folders[str(file.location.parent)].append(index)
    found = list(files)

    def look_up(indices: Sequence[int]) -> None:
        """Look up files of one folder."""
        first = files[indices[0]].location
        listed = {} if first.is_local or len(indices) < _LISTED_AT_ONCE else _list(first.parent)
        for index in indices:
            location = files[index].location
            if stat := listed.get(location.name) or _stat(location):
                found[index] = replace(files[index], length=stat.bytes, version=stat.version)

    with ThreadPoolExecutor(_READERS) as pool:
        for _ in pool.map(look_up, (part for indices in folders.values() for part in _parts(files, indices))):
            pass
    return found


def _parts(files: Sequence[MediaFile], indices: Sequence[int]) -> Iterator[Sequence[int]]:
    """Divide local files of one folder into parts that are looked up at the same time."""
    size = _LOCAL_AT_ONCE if files[indices[0]].location.is_local else len(indices)
    return (indices[first : first + size] for first in range(0, len(indices), size))


def _list(folder: Location) -> Mapping[str, Stat]:
    try:
        return folder.stats()
    except PermissionError:  # its files may be readable all the same
        return {}


def _stat(location: Location) -> Stat | None:
    try:
        return location.stat()
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        return None
