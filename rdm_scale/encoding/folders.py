"""Folders of images or videos: class names from sub-folders, captions in text files beside the media."""

import posixpath
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from rdm_scale.encoding.media import MAX_CAPTION_BYTES, MediaEntry, MediaKind, decode_text, media_kind
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location

_CAPTION_READERS = 16  # threads: each caption is a separate file
_FILES_PER_BATCH = 4096


class _Listing(NamedTuple):
    """Files below a folder, by path relative to it, without hidden ones."""

    media: list[tuple[str, MediaKind]]  # path and kind, sorted by path
    text_bytes: dict[str, int]  # sizes of the .txt files
    others: int


def read_folder(folder: Location) -> Iterator[MediaEntry | None]:
    """Find all images and videos below a folder, sorted by path.

    The class of a file is the name of the sub-folder directly below `folder`, its caption is in `name.txt` beside it.

    Yields:
        Entries, and None for every file that is neither an image, a video nor the caption of one.

    Raises:
        DataError: a caption is too long or not UTF-8.
        OSError: the folder cannot be read.
    """
    media, text_bytes, others = _list(folder)
    captions = {_caption_path(path) for path, _ in media} & text_bytes.keys() if text_bytes else set()
    yield from [None] * (others + len(text_bytes) - len(captions))

    def caption_of(path: str) -> str | None:
        beside = _caption_path(path)
        return _read_caption(folder / beside, text_bytes[beside]) if beside in captions else None

    with ThreadPoolExecutor(_CAPTION_READERS) as pool:
        for start in range(0, len(media), _FILES_PER_BATCH):
            batch = media[start : start + _FILES_PER_BATCH]
            texts: Iterable[str | None] = [None] * len(batch)
            if captions:
                texts = pool.map(caption_of, [path for path, _ in batch])
            for (path, kind), caption in zip(batch, texts, strict=True):
                file = folder / path
                class_name = path.split("/")[0] if "/" in path else None
                yield MediaEntry(kind, posixpath.splitext(path)[0], class_name, caption, file, str(file))


def _list(folder: Location) -> _Listing:
    media: list[tuple[str, MediaKind]] = []
    text_bytes: dict[str, int] = {}
    others = 0
    for path, stat in sorted(folder.find().items()):
        if any(part.startswith(".") for part in path.split("/")):
            continue
        if kind := media_kind(path):
            media.append((path, kind))
        elif path.endswith(".txt"):
            text_bytes[path] = stat.bytes
        else:
            others += 1
    return _Listing(media, text_bytes, others)


def _caption_path(path: str) -> str:
    return f"{posixpath.splitext(path)[0]}.txt"


def _read_caption(file: Location, size: int) -> str:
    if size > MAX_CAPTION_BYTES:
        raise DataError(f"{file} has {size} bytes: too many for a caption (at most {MAX_CAPTION_BYTES}); shorten it")
    content = file.read_range(0, MAX_CAPTION_BYTES + 1)
    return decode_text(content, MAX_CAPTION_BYTES, str(file), "a caption")
