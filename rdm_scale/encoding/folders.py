"""Folders of images or videos: class names from sub-folders, captions in text files beside the media."""

import posixpath
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from rdm_scale.encoding.left_out import HIDDEN, LeftOutEntry, left_out_file, left_out_others
from rdm_scale.encoding.media import MAX_CAPTION_BYTES, MediaEntry, MediaKind, decode_text, media_kind
from rdm_scale.encoding.plain_text import DecodedText, LegacyText
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location, Stat, Walk

_CAPTION_READERS = 16  # threads: each caption is a separate file
_FILES_PER_BATCH = 4096


class _Found(NamedTuple):
    """An image or video, by its path relative to the folder."""

    path: str
    kind: MediaKind
    stat: Stat


class _Listing(NamedTuple):
    """Files below a folder, without hidden ones."""

    media: list[_Found]  # sorted by path
    texts: dict[str, tuple[str, int]]  # path and size of each .txt file, by its path without the suffix
    left_out: list[LeftOutEntry]


def read_folder(folder: Location, walk: Walk) -> Iterator[MediaEntry | LeftOutEntry | LegacyText]:
    """Find all images and videos below a folder, sorted by path.

    The class of a file is the name of the sub-folder directly below `folder`, its caption is in `name.txt` beside it.

    Args:
        walk: all entries below the folder.

    Yields:
        Entries, and what is neither an image, a video nor the caption of one.

    Raises:
        DataError: a caption is too long or cannot be decoded.
        OSError: a file cannot be read.
    """
    media, texts, left_out = _list(folder, walk)
    yield from left_out
    stems = {posixpath.splitext(one.path)[0] for one in media} if texts else set()
    for stem in sorted(texts.keys() - stems):
        yield LeftOutEntry(".txt files that are no captions", str(folder / texts[stem][0]))
    captioned = texts.keys() & stems

    def caption_of(stem: str) -> DecodedText | None:
        return _read_caption(folder / texts[stem][0], texts[stem][1]) if stem in captioned else None

    with ThreadPoolExecutor(_CAPTION_READERS) as pool:
        for start in range(0, len(media), _FILES_PER_BATCH):
            batch = media[start : start + _FILES_PER_BATCH]
            keys = [posixpath.splitext(one.path)[0] for one in batch]
            captions: Iterable[DecodedText | None] = pool.map(caption_of, keys) if captioned else [None] * len(batch)
            for one, key, caption in zip(batch, keys, captions, strict=True):
                file = folder / one.path
                if caption and caption.legacy:
                    yield LegacyText(str(folder / texts[key][0]))
                class_name = key.split("/")[0] if "/" in key else None
                yield MediaEntry(
                    one.kind,
                    key,
                    class_name,
                    caption and caption.text,
                    file,
                    str(file),
                    length=one.stat.bytes,
                    version=one.stat.version,
                    origin=one.path,
                )


def _list(folder: Location, walk: Walk) -> _Listing:
    listing = _Listing([], {}, list(left_out_others(walk, str(folder))))
    for path, stat in walk.files.items():
        stem, suffix = posixpath.splitext(path)
        if any(part.startswith(".") for part in path.split("/")):
            listing.left_out.append(LeftOutEntry(HIDDEN, str(folder / path)))
        elif kind := media_kind(path):
            listing.media.append(_Found(path, kind, stat))
        elif suffix.lower() == ".txt" and stem not in listing.texts:
            listing.texts[stem] = path, stat.bytes
        else:
            listing.left_out.append(left_out_file(path, str(folder / path)))
    return listing


def _read_caption(file: Location, size: int) -> DecodedText:
    if size > MAX_CAPTION_BYTES:
        raise DataError(f"{file} has {size} bytes: too many for a caption (at most {MAX_CAPTION_BYTES}); shorten it")
    content = file.read_range(0, MAX_CAPTION_BYTES + 1)
    return decode_text(content, MAX_CAPTION_BYTES, str(file), "a caption")
