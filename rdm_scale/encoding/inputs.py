"""Inputs of encoding: listing the images or videos in folders, webdataset tars, or lists of paths.

Listing reads file names and the small files beside them (classes, captions), so millions of images or videos fit in
memory. Inputs are untrusted: sizes are bounded, and an inconsistent set (some files without a class, two files with the
same key) is refused.
"""

import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import xxhash

from rdm_scale.encoding import lists
from rdm_scale.encoding.class_order import MAX_CLASSES, ClassOrder, NumberedClasses, number_classes
from rdm_scale.encoding.folders import read_folder
from rdm_scale.encoding.left_out import (
    LeftOutEntry,
    LeftOutKind,
    LeftOutTally,
    left_out_file,
    left_out_others,
    listed,
)
from rdm_scale.encoding.listed_stats import with_stats
from rdm_scale.encoding.lists import Columns, read_list
from rdm_scale.encoding.media import EXTENSIONS, MediaEntry, MediaFile, MediaKind, media_kind
from rdm_scale.encoding.plain_text import LegacyText
from rdm_scale.encoding.tars import read_tars
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location, Walk

__all__ = ["Columns", "MediaFile", "MediaKind", "MediaSet", "find_images", "find_media"]

_SHOWN = 5  # keys that occur more than once
_FORBIDDEN_IN_KEY = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # surrogates stand for bytes that are not UTF-8


@dataclass(frozen=True)
class MediaSet:
    """Images, or videos, in the order of their source."""

    files: tuple[MediaFile, ...]
    kind: MediaKind
    class_names: tuple[str, ...]  # empty: no classes, all labels are -1
    captioned: bool  # True: every file has a caption, which may be empty; False: none has
    left_out: tuple[LeftOutKind, ...] = ()  # what the input holds besides, and what does not belong to any of the files
    notes: tuple[str, ...] = ()  # what a user should know about labels and texts
    place: str = ""  # path or URL of the input

    @property
    def ignored(self) -> int:
        """Number of entries of the input that are not encoded."""
        return sum(one.number for one in self.left_out)

    def check_left_out(self, share: float) -> None:
        """Check that few entries are left out that may be images or videos.

        Args:
            share: of all images, videos and such entries, that may be left out.

        Raises:
            DataError: more are left out.
        """
        missed = [one for one in self.left_out if one.missed]
        number = sum(one.number for one in missed)
        total = number + len(self.files)
        if number > share * total:
            raise DataError(
                f"{number} of {total} entries of the input would be left out, more than a share of {share}: "
                f"{listed(missed)}. Convert or remove them, or raise --max-left-out"
            )


def find_media(
    url: str,
    columns: Columns | None = None,
    options: Mapping[str, Any] | None = None,
    class_order: ClassOrder | None = None,
    *,
    prefix_keys: bool = False,
    outputs: Sequence[Location] = (),
) -> MediaSet:
    """List the images, or the videos, of an input on any fsspec file system.

    - A folder, searched recursively and sorted. The class is the name of the sub-folder directly below it, if there
      are any; a caption is in `name.txt` beside the file. Links are followed, hidden files are left out.
    - A webdataset tar, or a folder or glob of them. For `key.png`, the class (a number or a name) is in `key.cls` and
      the caption in `key.txt`, or both are fields of `key.json`.
    - A `.jsonl` or `.parquet` list (or a glob of them) of paths with optional labels, captions and keys.

    Args:
        columns: names in lists and in a tar's `key.json`; by default path, label, caption and key.
        options: of the fsspec file system, beyond what it takes from the environment.
        class_order: of class names that are not labels themselves; None: as text.
        prefix_keys: begin each key with the name of its tar, always, so that keys that start anew in every tar differ.
        outputs: folders that are no part of the input, even if they lie in it.

    Raises:
        ConfigError: the URL names an unknown file system.
        DataError: there are no images or videos, or both; a tar or list is damaged; two files have the same key; or
            only some files have a class or a caption.
    """
    columns = columns or Columns()
    location = Location(url, options)
    collector = _Collector()
    try:
        source = _open_source(location, columns, options, outputs)
        if prefix_keys and source.prefixes is None:
            raise DataError(
                f"{location} is not a tar or a set of tars: keys cannot be prefixed with the names of tars; leave out "
                "--prefix-keys"
            )
        for entry in source.entries:
            if isinstance(entry, LeftOutEntry):
                collector.left_out.add(entry)
            elif isinstance(entry, LegacyText):
                collector.legacy.append(entry)
            elif prefix_keys and source.prefixes is not None:
                collector.add(entry._replace(key=f"{source.prefixes[entry.location.path]}/{entry.key}"))
            else:
                collector.add(entry)
        if source.listed:
            collector.files = with_stats(collector.files)
    except OSError as error:
        raise DataError(f"cannot read the input {location}: {error}") from None
    return collector.result(
        location,
        columns,
        numbers=source.numbers,
        order=class_order,
        prefixable=source.prefixes is not None and not prefix_keys,
    )


def find_images(url: str) -> MediaSet:
    """List the images of an input, see `find_media`. Raises DataError: also if it holds videos."""
    source = find_media(url)
    if source.kind != "image":
        raise DataError(f"{url} holds {len(source.files)} videos: images are needed here")
    return source


class _Collector:
    """Collector of the entries of a source, which checks that they make a consistent set.

    Each class name is stored once, and labels are provisional until all names are known.
    """

    def __init__(self) -> None:
        self.files: list[MediaFile] = []
        self.kinds: Counter[MediaKind] = Counter()
        self.classes: dict[str, int] = {}  # class name to provisional label
        self.left_out = LeftOutTally()
        self.legacy: list[LegacyText] = []

    def add(self, entry: MediaEntry) -> None:
        """Add an image or video."""
        if _FORBIDDEN_IN_KEY.search(entry.key):
            raise DataError(f"the name of {entry.name!r} contains a control character or is not UTF-8: rename it")
        label = -1 if entry.class_name is None else self.classes.setdefault(entry.class_name, len(self.classes))
        if len(self.classes) > MAX_CLASSES:
            raise DataError(f"{entry.name}: there are more than {MAX_CLASSES} classes: is this a column of labels?")
        self.kinds[entry.kind] += 1
        self.files.append(
            MediaFile(
                entry.key,
                label,
                entry.caption,
                entry.location,
                entry.name,
                entry.offset,
                entry.length,
                entry.version,
                entry.origin,
                entry.group,
            )
        )

    def result(
        self, where: Location, columns: Columns, *, numbers: bool, order: ClassOrder | None, prefixable: bool
    ) -> MediaSet:
        """Build the complete set. Raises DataError: it is empty or inconsistent."""
        if not self.files:
            known = ", ".join(extension for extensions in EXTENSIONS.values() for extension in extensions)
            held = listed(self.left_out.kinds()) or "it is empty"
            raise DataError(
                f"there are no images or videos in {where} ({held}): it must be a folder of "
                f"{known} files, a webdataset tar, a folder or glob of tars, or a .jsonl or .parquet list"
            )
        if len(self.kinds) > 1:
            raise DataError(
                f"{where} holds both {self.kinds['image']} images and {self.kinds['video']} videos: "
                "encode them as two sets"
            )
        (kind,) = self.kinds
        _check_unique(self.files, prefixable)
        captions = sum(file.caption is not None for file in self.files)
        self._check_all_or_none(captions, "caption", f"{kind}s", where)
        self._check_all_or_none(sum(file.label >= 0 for file in self.files), "class", f"{kind}s", where)
        if columns.group and not any(file.group is not None for file in self.files):
            raise DataError(
                f"{where} has no groups in a column or field {columns.group!r}: only lists and tars have them; leave "
                "out --group-column for other inputs"
            )
        _check_columns(columns, label=bool(self.classes), caption=bool(captions), where=where)
        classes = self._number_classes(where, numbers, order)
        notes = (*classes.notes, *self._legacy_note())
        return MediaSet(
            tuple(self.files), kind, classes.names, bool(captions), self.left_out.kinds(), notes, where.resolved
        )

    def _check_all_or_none(self, given: int, what: str, kind: str, where: Location) -> None:
        if given and (missing := len(self.files) - given):
            raise DataError(
                f"{where}: {missing} of {len(self.files)} {kind} have no {what}: give all of them one, or none"
            )

    def _number_classes(self, where: Location, numbers: bool, order: ClassOrder | None) -> NumberedClasses:
        """Give the files their final labels, instead of the provisional ones."""
        if not self.classes:
            return NumberedClasses([], ())

        def example(provisional: int) -> str:
            return next(file.name for file in self.files if file.label == provisional)

        numbered = number_classes(list(self.classes), str(where), example, numbers=numbers, order=order)
        for i, file in enumerate(self.files):
            self.files[i] = replace(file, label=numbered.labels[file.label])
        return numbered

    def _legacy_note(self) -> list[str]:
        if not self.legacy:
            return []
        return [
            f"{len(self.legacy)} texts are not UTF-8 and were read as Windows-1252, as older editors write "
            f"(for example {self.legacy[0].name}): convert them to UTF-8 if letters come out wrong"
        ]


def _check_columns(columns: Columns, *, label: bool, caption: bool, where: Location) -> None:
    """Refuse a column that was named explicitly but is missing: probably a mistake, not an unlabeled set."""
    for field, given in (("label", label), ("caption", caption)):
        name, default = getattr(columns, field), next(f.default for f in fields(Columns) if f.name == field)
        if name != default and not given:
            raise DataError(
                f"{where} has no {field}s in a column or field {name!r}: correct the name, or leave out the option"
            )


def _check_unique(files: Sequence[MediaFile], prefixable: bool) -> None:
    # Compares sorted hashes: a dictionary of ten million keys would take a gigabyte.
    hashes = np.fromiter((xxhash.xxh3_64_intdigest(file.key.encode()) for file in files), np.uint64, len(files))
    ordered = np.sort(hashes)
    if not (repeated := set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())):
        return
    seen: dict[str, list[str]] = {}
    for file, number in zip(files, hashes.tolist(), strict=True):
        if number in repeated:
            seen.setdefault(file.key, []).append(file.name)
    shared = [f"{names[0]} and {names[1]} have the same key {key!r}" for key, names in seen.items() if len(names) > 1]
    if not shared:  # of two keys with the same hash
        return
    more = f", and {len(shared) - _SHOWN} other keys occur more than once" if len(shared) > _SHOWN else ""
    prefix = ", or begin keys with the names of their tars (--prefix-keys)" if prefixable else ""
    raise DataError(
        f"{'; '.join(shared[:_SHOWN])}{more}: rename one of them, or use a list with a column of keys{prefix}"
    )


class _InputSource(NamedTuple):
    """Entries of an input."""

    entries: Iterator[MediaEntry | LeftOutEntry | LegacyText]
    numbers: bool  # classes may be given as numbers
    prefixes: Mapping[str, str] | None = None  # of the keys of each tar, by its path
    listed: bool = False  # a list names them, which does not say their sizes and versions


def _open_source(
    location: Location, columns: Columns, options: Mapping[str, Any] | None, outputs: Sequence[Location]
) -> _InputSource:
    if location.is_dir():
        walk = _without(location.walk(), location, outputs)
        names = [name for name in walk.files if "/" not in name and not name.startswith(".")]
        tars = [name for name in names if name.endswith(".tar")]
        if tars and any(media_kind(name) for name in names):
            raise DataError(f"{location} holds both tars and images or videos: keep them in separate folders")
        if tars:
            found = [location / name for name in tars]
            entries = chain(_beside_tars(location, walk), read_tars(found, columns))
            return _InputSource(entries, numbers=True, prefixes=_tar_names(found, location.path))
        return _InputSource(read_folder(location, walk), numbers=False)
    matches = _matches(location)
    tars_only = [match for match in matches if match.name.endswith(".tar")]
    if not tars_only:
        rows = (entry for match in matches for entry in read_list(match, columns, options))
        return _InputSource(rows, numbers=True, listed=True)
    if len(tars_only) < len(matches):
        raise DataError(f"{location} matches both tars and lists: encode them as two sets")
    fixed = re.split(r"[*?\[]", location.path)[0]  # of a glob, up to its first pattern
    return _InputSource(
        read_tars(matches, columns), numbers=True, prefixes=_tar_names(matches, posixpath.dirname(fixed))
    )


def _tar_names(tars: Sequence[Location], folder: str) -> dict[str, str]:
    """Names of tars, below a folder and without the suffix, by their paths."""
    return {tar.path: posixpath.relpath(tar.path, folder).removesuffix(".tar") for tar in tars}


def _without(walk: Walk, folder: Location, outputs: Sequence[Location]) -> Walk:
    """Take out what lies in folders of outputs."""
    inside = [one.resolved for one in outputs if one.is_inside(folder) and one.resolved != folder.resolved]
    skipped = tuple(f"{posixpath.relpath(one, folder.resolved)}/" for one in inside)
    if not skipped:
        return walk
    files = {path: stat for path, stat in walk.files.items() if not path.startswith(skipped)}
    return Walk(files, {path: kind for path, kind in walk.others.items() if not path.startswith(skipped)})


def _beside_tars(folder: Location, walk: Walk) -> Iterator[LeftOutEntry]:
    """Yield what is left out of a folder of tars, of which only the tars directly in it are read."""
    yield from left_out_others(walk, str(folder))
    for path in walk.files:
        name = str(folder / path)
        if "/" in path and (media_kind(path) or path.endswith(".tar")):
            yield LeftOutEntry("images, videos or tars in sub-folders of a folder of tars", name, missed=True)
        elif not path.endswith(".tar") or path.startswith("."):
            yield left_out_file(path, name)


def _matches(location: Location) -> list[Location]:
    """The tars or lists that a path or glob stands for."""
    if location.exists():
        if not _is_container(location):
            raise DataError(
                f"{location} is neither a folder nor a .tar, .jsonl or .parquet file (unpack compressed files first)"
            )
        return [location]
    matches = _glob(location)
    if not matches:
        raise DataError(f"the input {location} does not exist: check the path")
    if wrong := [match for match in matches if not _is_container(match) or match.is_dir()]:
        raise DataError(f"{location} matches {wrong[0]}, which is not a .tar, .jsonl or .parquet file")
    return matches


def _glob(location: Location) -> list[Location]:
    try:
        return location.glob()
    except OSError as error:
        raise OSError(f"it cannot be listed: {error}") from None


def _is_container(location: Location) -> bool:
    return location.name.endswith((".tar", *(f".{extension}" for extension in lists.EXTENSIONS)))
