"""Decoding of small text files as people's editors write them.

UTF-8, with or without a byte order mark, UTF-16 and UTF-32. Windows-1252, of which Latin-1 is a part, is what older
editors of Western languages write. Every other encoding is refused: guessing would turn captions into other characters.
"""

import codecs
import re
from typing import NamedTuple

# A mark of UTF-16 is the beginning of one of UTF-32.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LEGACY = "cp1252"
_HEAD_BYTES = 1024  # that UTF-16 without a mark is recognized by
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")
_MOST_ACCENTED = 1 / 3  # of the letters of Western text; of text in another alphabet nearly all are beyond ASCII


class DecodedText(NamedTuple):
    """Text of a file.

    Attributes:
        legacy: True if it was decoded as Windows-1252, which no mark or structure confirms.
    """

    text: str
    legacy: bool = False


class LegacyText(NamedTuple):
    """A file or line that was decoded as Windows-1252."""

    name: str


def detect_encoding(head: bytes) -> str:
    """Encoding by the byte order mark, or by the zero bytes that UTF-16 has in Western text; else `utf-8`.

    Args:
        head: beginning of the file.
    """
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    head = head[:_HEAD_BYTES]
    even, odd = head[: len(head) // 2 * 2 : 2], head[1::2]
    if len(even) > 1 and odd.count(0) > len(odd) / 2 and not even.count(0):
        return "utf-16-le"
    if len(even) > 1 and even.count(0) > len(even) / 2 and not odd.count(0):
        return "utf-16-be"
    return "utf-8"


def decode_plain_text(content: bytes) -> DecodedText:
    """Decode a text. Raises ValueError: it is not text in any of the encodings."""
    encoding = detect_encoding(content)
    try:
        text = content.decode(encoding)
        if "\0" in text:
            raise ValueError("it contains zero bytes")
        return DecodedText(text)
    except UnicodeDecodeError:
        if encoding != "utf-8":
            raise
    text = content.decode(_LEGACY)
    letters = sum(map(str.isalpha, text))
    accented = sum(not character.isascii() for character in text)
    if _CONTROL.search(text) or accented > _MOST_ACCENTED * max(letters, 3):
        raise ValueError("it is neither UTF-8 nor Western text")
    return DecodedText(text, legacy=True)
