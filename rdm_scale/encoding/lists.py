"""Lists of images or videos: JSON lines or Parquet, read as a stream.

The column `path` is relative to the list's folder, or an absolute path or URL. Columns for a class, a caption and a
key are optional. Listed files are not opened, so a list of millions costs no more than reading it.
"""

import codecs
import json
import math
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, NamedTuple

from rdm_scale.encoding.left_out import LeftOutEntry, left_out_file
from rdm_scale.encoding.media import MAX_CAPTION_BYTES, MediaEntry, media_kind
from rdm_scale.encoding.plain_text import LegacyText, decode_plain_text, detect_encoding
from rdm_scale.errors import ConfigError, DataError
from rdm_scale.storage.location import Location

EXTENSIONS = ("jsonl", "parquet")
_MAX_LINE_BYTES = 2**20
_MAX_TEXT = 4096  # characters of a path, a class name or a key
MAX_COLUMN_BYTES = 2**31  # of one row group, uncompressed
_CHUNK_BYTES = 2**20
_BATCH_ROWS = 8192


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a list (or, for label, caption and group, of the fields of a tar's `key.json`)."""

    path: str = "path"
    label: str = "label"
    caption: str = "caption"
    key: str = "key"
    group: str | None = None  # of what the held-out split goes by; None: by the file of an entry


class _Row(NamedTuple):
    """One entry of a list."""

    values: Mapping[str, Any]  # by column
    name: str  # for error messages: the list and the line or row
    legacy: bool = False  # it was decoded as Windows-1252


def read_list(
    location: Location,
    columns: Columns,
    options: Mapping[str, Any] | None = None,
    *,
    max_column_bytes: int = MAX_COLUMN_BYTES,
) -> Iterator[MediaEntry | LeftOutEntry | LegacyText]:
    """Read all images and videos of a list, in its order.

    The key of an entry without one is its path without the extension.

    Args:
        options: of the file systems of listed URLs, where that is not the file system of the list.
        max_column_bytes: of a column in one row group of a Parquet file, uncompressed.

    Yields:
        Entries, and every row whose path is neither an image nor a video by its extension.

    Raises:
        DataError: the file is not a list, has no column of paths, or contains an invalid value.
        OSError: it cannot be read.
    """
    if location.name.endswith(".jsonl"):
        rows = _json_rows(location)
    else:
        rows = _parquet_rows(location, columns, max_column_bytes)
    resolver = _PathResolver(location, options)
    keyed = None
    for row, name, legacy in rows:
        if legacy:
            yield LegacyText(name)
        path = _required_text(row, columns.path, name)
        key = _parse_key(row.get(columns.key), columns.key, name)
        if keyed is None:
            keyed = key is not None
        elif keyed != (key is not None):
            raise DataError(
                f"{name}: some entries have a {columns.key!r} and others do not: give one to all entries, or to none"
            )
        query = "?" in path and path.startswith(("http://", "https://"))
        plain = path.partition("?")[0] if query else path
        kind = media_kind(plain)
        if kind is None:  # whatever it is, someone has put it into the list
            yield left_out_file(plain, f"{name}: {_shown(path)}")._replace(missed=True)
            continue
        class_name = parse_label(row.get(columns.label), columns.label, name)
        caption = parse_caption(row.get(columns.caption), columns.caption, name)
        file = resolver.resolve(path, name)
        group = parse_group(row, columns, name)
        if group is None and (keyed or query):  # several entries may be made of one file
            group = resolver.below(str(file).partition("?")[0] if query else str(file))
        if key is None:
            key = path if query else posixpath.splitext(path if "://" in path else posixpath.normpath(path))[0]
        yield MediaEntry(kind, key, class_name, caption, file, str(file), origin=path, group=group)


class _PathResolver:
    """Resolver of the paths and URLs of a list; each file system is opened once, not once per entry."""

    def __init__(self, location: Location, options: Mapping[str, Any] | None) -> None:
        self._folder, self._options = location.parent, dict(options or {})
        self._systems = dict.fromkeys(location.schemes, location)

    def below(self, file: str) -> str:
        """The path of a file without its suffix, relative to the list's folder if it lies below it."""
        return posixpath.splitext(file.removeprefix(posixpath.join(str(self._folder), "")))[0]

    def resolve(self, path: str, name: str) -> Location:
        """Location of a path or URL. Raises DataError: the file system is unknown."""
        scheme, separator, _ = path.partition("://")
        if not separator:
            if not path.startswith("/"):
                return self._folder.at(posixpath.normpath(posixpath.join(self._folder.path, path)))
            scheme, path = "file", f"file://{path}"
        if scheme not in self._systems:
            try:
                self._systems[scheme] = Location(path, None if scheme == "file" else self._options)
            except ConfigError as error:
                raise DataError(f"{name}: {error}") from None
        return self._systems[scheme].at(path)


def _json_rows(location: Location) -> Iterator[_Row]:
    for number, line in enumerate(_lines(location), 1):
        name = f"{location}, line {number}"
        if not line.strip():
            continue
        try:
            text, legacy = decode_plain_text(line)
        except ValueError:
            raise DataError(
                f"{name} is not JSON: it cannot be decoded as UTF-8, UTF-16 or Windows-1252; convert the list to UTF-8"
            ) from None
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name} is not JSON ({error}): correct it") from None
        if not isinstance(row, dict):
            raise DataError(f"{name} is not a JSON object, such as " + '{"path": "a.png", "caption": "..."}')
        yield _Row(row, name, legacy)


def _lines(location: Location) -> Iterator[bytes]:
    rest = b""
    with location.open() as file:
        try:
            for chunk in _utf8_chunks(file):
                *complete, rest = (rest + chunk).split(b"\n")
                yield from complete
                if len(rest) > _MAX_LINE_BYTES:
                    raise DataError(f"{location} has a line of more than {_MAX_LINE_BYTES} bytes: is it a .jsonl file?")
        except UnicodeError as error:
            raise DataError(f"{location} is damaged: {error}; write it anew, in UTF-8") from None
    if rest:
        yield rest


def _utf8_chunks(file: IO[bytes]) -> Iterator[bytes]:
    """Read a file in chunks, those of UTF-16 and UTF-32 as UTF-8. Other encodings are left as they are."""
    decoder = None
    while chunk := file.read(_CHUNK_BYTES):
        if decoder is None:
            encoding = detect_encoding(chunk)
            if encoding.startswith("utf-8"):
                yield chunk.removeprefix(codecs.BOM_UTF8)
                yield from iter(partial(file.read, _CHUNK_BYTES), b"")
                return
            decoder = codecs.getincrementaldecoder(encoding)()
        yield decoder.decode(chunk).encode()
    if decoder is not None:
        decoder.decode(b"", final=True)


def _parquet_rows(location: Location, columns: Columns, max_column_bytes: int) -> Iterator[_Row]:
    import pyarrow as pa  # takes a second to import
    import pyarrow.parquet as pq

    try:
        with location.open() as file, pq.ParquetFile(file) as parquet:
            used = _used_columns(location, parquet.schema_arrow, columns)
            _check_row_groups(location, parquet.metadata, used, max_column_bytes)
            row = 0
            for batch in parquet.iter_batches(_BATCH_ROWS, columns=used, use_threads=False):
                for values in zip(*(batch.column(name).to_pylist() for name in used), strict=True):
                    row += 1
                    yield _Row(dict(zip(used, values, strict=True)), f"{location}, row {row}")
            if row != parquet.metadata.num_rows:
                raise DataError(f"{location} is damaged: {row} of {parquet.metadata.num_rows} rows could be read")
    except (pa.ArrowException, ValueError, OSError) as error:  # Arrow raises OSError for damaged pages, too
        what = "cannot be read" if isinstance(error, OSError) else "is not a Parquet file, or is damaged"
        raise DataError(f"{location} {what}: {str(error).strip()}") from None


def _used_columns(location: Location, schema: Any, columns: Columns) -> Sequence[str]:
    names = schema.names
    if columns.path not in names:
        embedded = [name for name in ("image", "video") if name in names]
        reason = (
            f": it seems to contain the files themselves (column {embedded[0]!r}), which is not supported; "
            "write them as files or as webdataset tars"
            if embedded
            else f", only {', '.join(map(repr, names))}"
        )
        raise DataError(f"{location} has no column {columns.path!r} of paths{reason}")
    wanted = (columns.path, columns.label, columns.caption, columns.key, columns.group or columns.path)
    return [name for name in dict.fromkeys(wanted) if name in names]


def _check_row_groups(location: Location, metadata: Any, used: Sequence[str], limit: int) -> None:
    """Refuse row groups that would not fit in memory: column chunks are decompressed as a unit."""
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            if column.path_in_schema.split(".")[0] in used and column.total_uncompressed_size > limit:
                raise DataError(
                    f"{location}: column {column.path_in_schema!r} has {column.total_uncompressed_size} bytes in one "
                    "row group: write it with smaller row groups"
                )


def parse_label(value: object, column: str, name: str) -> str | None:
    """Class name of a label, a number as its digits; None for no label.

    Raises:
        DataError: it is neither text nor a non-negative integer.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):  # NaN: pandas' missing number
        return None
    if isinstance(value, float) and value.is_integer():  # how pandas stores a column of integers with missing values
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return str(value)
    if isinstance(value, str) and 0 < len(value.strip()) <= _MAX_TEXT:
        return value.strip()
    raise DataError(
        f"{name}: {_shown(value)} in {column!r} is not a label: give an integer from 0 on, a name, or nothing"
    )


def parse_caption(value: object, column: str, name: str) -> str | None:
    """Caption without surrounding white space; None for no caption. Raises DataError: it is not text, or too long."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str):
        raise DataError(f"{name}: {_shown(value)} in {column!r} is not a caption: it must be one string")
    try:
        size = len(value) if value.isascii() else len(value.encode())
    except UnicodeEncodeError:
        raise DataError(f"{name}: the caption in {column!r} is not valid Unicode: correct it") from None
    if size > MAX_CAPTION_BYTES:
        raise DataError(f"{name}: the caption in {column!r} has {size} bytes; at most {MAX_CAPTION_BYTES} are read")
    return value.strip()


def _parse_key(value: object, column: str, name: str) -> str | None:
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and 0 < len(value) <= _MAX_TEXT:
        return value
    raise DataError(f"{name}: {_shown(value)} in {column!r} is not a key: it must be an integer or a non-empty string")


def parse_group(row: Mapping[str, Any], columns: Columns, name: str) -> str | None:
    """Group of an entry; None if no column of groups was named. Raises DataError: it has none."""
    if columns.group is None:
        return None
    group = _parse_key(row.get(columns.group), columns.group, name)
    if group is None:
        raise DataError(f"{name} has no {columns.group!r}: every entry needs one when a column of groups is given")
    return group


def _required_text(row: Mapping[str, Any], column: str, name: str) -> str:
    value = row.get(column)
    if value is None:
        raise DataError(f"{name} has no {column!r}: every entry needs the path or URL of its file")
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_TEXT:
        raise DataError(f"{name}: {_shown(value)} in {column!r} is not a path or URL: correct it")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
