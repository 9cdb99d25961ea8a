"""What can be encoded: images or videos in folders, in webdataset tars, or named by lists; found, not yet read.

Finding reads names, and the small files beside them (classes, captions), so that millions of images or videos fit.
Everything is untrusted: sizes are bounded, and a set that is not whole (some without a class, two with one key) is
refused.
"""

import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import xxhash

from rdm_scale.encoding import lists
from rdm_scale.encoding.lists import Columns, in_list
from rdm_scale.encoding.media import EXTENSIONS, MAX_CAPTION_BYTES, Found, Kind, MediaFile, as_text, kind_of
from rdm_scale.encoding.tars import in_tars
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location

__all__ = ["Columns", "Kind", "MediaFile", "MediaSet", "find_media"]

_MAX_CLASSES = 1_000_000
_UNFIT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # in a key; surrogates stand for bytes that are not UTF-8
_READERS = 16  # captions read at a time: each is a file of its own
_CAPTIONS_AT_ONCE = 4096


@dataclass(frozen=True)
class MediaSet:
    """Images or videos, in the order of their source."""

    files: tuple[MediaFile, ...]
    kind: Kind
    class_names: tuple[str, ...]  # empty: no classes, all labels are -1
    captioned: bool  # all have a caption, which may be empty; otherwise none has
    ignored: int  # files or entries that are neither image nor video by their name, nor belong to one


def find_media(url: str, columns: Columns | None = None, options: Mapping[str, Any] | None = None) -> MediaSet:
    """All images, or all videos, of an input, which may be on any fsspec file system:

    - a folder, searched to its bottom and sorted. The class is the name of the sub-folder directly below it, if there
      are any; a caption is in `name.txt` beside the file. Hidden files are ignored.
    - a webdataset tar, or a folder or glob of them. Of `key.png` the class is in `key.cls`, a number or a name, the
      caption in `key.txt`; or both are fields of `key.json`.
    - a `.jsonl` or `.parquet` list (or a glob of them) of paths with optional labels, captions and keys.

    Args:
        columns: names in lists and in a tar's `key.json`; by default path, label, caption and key.
        options: of the fsspec file system, beyond what it takes from the environment.

    Raises:
        ConfigError: the URL names no file system that is known.
        DataError: nothing there, both images and videos, a damaged tar or list, two files with one key, or only some
            with a class or a caption.
    """
    columns = columns or Columns()
    location = Location(url, options)
    gathered = _Gathered()
    try:
        source, numbers = _source(location, columns, options)
        for found in source:
            gathered.add(found)
    except OSError as error:
        raise DataError(f"cannot read the input {location}: {error}") from None
    return gathered.result(location, columns, numbers=numbers)


class _Gathered:
    """Files so far. Class names are held once each, and labels numbered as they come until all are known."""

    def __init__(self) -> None:
        self.files: list[MediaFile] = []
        self.kinds: Counter[Kind] = Counter()
        self.classes: dict[str, int] = {}
        self.ignored = 0

    def add(self, found: Found | None) -> None:
        if found is None:
            self.ignored += 1
            return
        kind, key, class_name, caption, location, name, offset, length = found
        if _UNFIT.search(key):
            raise DataError(f"the name of {name!r} holds a control character or is not UTF-8: rename it")
        label = -1 if class_name is None else self.classes.setdefault(class_name, len(self.classes))
        if len(self.classes) > _MAX_CLASSES:
            raise DataError(f"{name}: there are more than {_MAX_CLASSES} classes: are these labels?")
        self.kinds[kind] += 1
        self.files.append(MediaFile(key, label, caption, location, name, offset, length))

    def result(self, where: Location, columns: Columns, *, numbers: bool) -> MediaSet:
        if not self.files:
            known = ", ".join(extension for extensions in EXTENSIONS.values() for extension in extensions)
            raise DataError(
                f"there are no images or videos in {where} ({self.ignored} other files): it must be a folder of "
                f"{known} files, a webdataset tar, a folder or glob of tars, or a .jsonl or .parquet list"
            )
        if len(self.kinds) > 1:
            raise DataError(
                f"{where} holds both {self.kinds['image']} images and {self.kinds['video']} videos: "
                "encode them as two sets"
            )
        (kind,) = self.kinds
        _check_unique(self.files)
        captions = sum(file.caption is not None for file in self.files)
        self._check_whole(captions, "caption", f"{kind}s", where)
        self._check_whole(sum(file.label >= 0 for file in self.files), "class", f"{kind}s", where)
        _check_columns(columns, label=bool(self.classes), caption=bool(captions), where=where)
        class_names = self._number_classes(where, numbers)
        return MediaSet(tuple(self.files), kind, class_names, bool(captions), self.ignored)

    def _check_whole(self, given: int, what: str, kind: str, where: Location) -> None:
        if given and (missing := len(self.files) - given):
            raise DataError(
                f"{where}: {missing} of {len(self.files)} {kind} have no {what}: give all of them one, or none"
            )

    def _number_classes(self, where: Location, numbers: bool) -> tuple[str, ...]:
        """Gives the files their labels; with `numbers`, class names that are all numbers are the labels."""
        if not self.classes:
            return ()
        names = list(self.classes)  # by the labels that the files have so far
        if numbers and all(name.isascii() and name.isdigit() for name in names):
            if max(map(len, names)) > len(str(_MAX_CLASSES)) or max(map(int, names)) >= _MAX_CLASSES:
                raise DataError(f"{where}: a class number is not below {_MAX_CLASSES}")
            labels = list(map(int, names))
            ordered = [str(i) for i in range(max(labels) + 1)]
        else:
            ordered = sorted(names)
            index = {name: i for i, name in enumerate(ordered)}
            labels = [index[name] for name in names]
        for i, file in enumerate(self.files):
            self.files[i] = replace(file, label=labels[file.label])
        return tuple(ordered)


def _check_columns(columns: Columns, *, label: bool, caption: bool, where: Location) -> None:
    """A column that was asked for by name, and is nowhere, is a mistake rather than an unlabelled set."""
    for field, given in (("label", label), ("caption", caption)):
        name, default = getattr(columns, field), next(f.default for f in fields(Columns) if f.name == field)
        if name != default and not given:
            raise DataError(f"{where} has no {field}s in a column or field {name!r}: correct the name or leave it out")


def _check_unique(files: Sequence[MediaFile]) -> None:
    # By sorted hashes: a dictionary of ten million keys would take a gigabyte.
    hashes = np.fromiter((xxhash.xxh3_64_intdigest(file.key.encode()) for file in files), np.uint64, len(files))
    ordered = np.sort(hashes)
    if not (repeated := set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())):
        return
    seen: dict[str, str] = {}
    for file, number in zip(files, hashes.tolist(), strict=True):
        if number in repeated:
            if file.key in seen:
                raise DataError(
                    f"{seen[file.key]} and {file.name} have the same key {file.key!r}: rename one of them, "
                    "or give a list a column of keys"
                )
            seen[file.key] = file.name


def _source(
    location: Location, columns: Columns, options: Mapping[str, Any] | None
) -> tuple[Iterator[Found | None], bool]:
    """What `location` stands for, and whether classes there may be given as numbers."""
    if location.is_dir():
        names = [name for name in location.names() if not name.startswith(".")]
        tars = [name for name in names if name.endswith(".tar")]
        if tars and any(kind_of(name) for name in names):
            raise DataError(f"{location} holds both tars and images or videos: keep them in folders of their own")
        if tars:
            return in_tars([location / name for name in tars], columns), True
        return _in_folder(location), False
    if location.exists():
        matches = [location]
        if not _is_container(location):
            raise DataError(
                f"{location} is neither a folder nor a .tar, .jsonl or .parquet file "
                "(what is compressed must be unpacked first)"
            )
    else:
        matches = _glob(location)
        if not matches:
            raise DataError(f"the input {location} does not exist")
        if wrong := [match for match in matches if not _is_container(match) or match.is_dir()]:
            raise DataError(f"{location} matches {wrong[0]}, which is not a .tar, .jsonl or .parquet file")
    tars_only = [match for match in matches if match.name.endswith(".tar")]
    if not tars_only:
        return (found for match in matches for found in in_list(match, columns, options)), True
    if len(tars_only) < len(matches):
        raise DataError(f"{location} matches both tars and lists: give them one at a time")
    return in_tars(matches, columns), True


def _glob(location: Location) -> list[Location]:
    try:
        return [Location(path, location.fs) for path in sorted(location.fs.glob(location.path))]
    except Exception as error:  # clients of object stores have exceptions of their own
        raise OSError(f"it cannot be listed: {error}") from None


def _is_container(location: Location) -> bool:
    return location.name.endswith((".tar", *(f".{extension}" for extension in lists.EXTENSIONS)))


def _in_folder(folder: Location) -> Iterator[Found | None]:
    media: list[tuple[Kind, str]] = []  # paths below the folder
    texts: dict[str, int] = {}  # sizes of the .txt files, by path
    others = 0
    for relative, stat in sorted(folder.find().items()):
        if any(part.startswith(".") for part in relative.split("/")):
            continue
        if kind := kind_of(relative):
            media.append((kind, relative))
        elif relative.endswith(".txt"):
            texts[relative] = stat.bytes
        else:
            others += 1
    beside = {f"{posixpath.splitext(relative)[0]}.txt" for _, relative in media} & texts.keys() if texts else set()
    yield from [None] * (others + len(texts) - len(beside))
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(media), _CAPTIONS_AT_ONCE):
            part = media[start : start + _CAPTIONS_AT_ONCE]
            names = [f"{posixpath.splitext(relative)[0]}.txt" for _, relative in part]
            captions: Iterable[str | None] = [None] * len(part)
            if beside:
                captions = pool.map(
                    lambda name: _caption(folder / name, texts[name]) if name in beside else None, names
                )
            for (kind, relative), caption in zip(part, captions, strict=True):
                file = folder / relative
                class_name = relative.split("/")[0] if "/" in relative else None
                yield Found(kind, posixpath.splitext(relative)[0], class_name, caption, file, str(file))


def _caption(file: Location, size: int) -> str:
    if size > MAX_CAPTION_BYTES:
        raise DataError(f"{file} has {size} bytes: too many for a caption")
    content = file.read_range(0, MAX_CAPTION_BYTES + 1)
    return as_text(content, MAX_CAPTION_BYTES, str(file), "a caption")


def find_images(url: str) -> MediaSet:
    """As `find_media`, where nothing but images will do. Raises DataError: these are videos, too."""
    source = find_media(url)
    if source.kind != "image":
        raise DataError(f"{url} holds {len(source.files)} videos: images are needed here")
    return source
