"""The scans of a JPEG: its coded data, and which runs of zero bytes they can contain.

Source: ITU-T T.81, annexes B (markers) and C (Huffman tables).
"""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

_START, _END = b"\xff\xd8", b"\xff\xd9"
_DHT, _SOS, _COM, _ADOBE = 0xC4, 0xDA, 0xFE, 0xEE
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_CHECKED_FRAMES = (0xC0, 0xC1, 0xC2)  # Huffman coded: baseline, extended sequential, progressive
_APPLICATION = range(0xE0, 0xF0)
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # neither a stuffed byte nor a restart marker nor fill
_ZERO_RUN = bytes(32)


class Scan(NamedTuple):
    """Coded data of a scan."""

    data: bytes
    zeros: bool  # False: zero bits code anything but a flat continuation, so the data have no long runs of zero bytes


@dataclass
class JpegScans:
    """The scans of a JPEG up to its end mark, the rest (thumbnails, profiles, further images) left out.

    Attributes:
        complete: False if there is no end mark.
        huffman: True if it is coded as decoders for this purpose know it: 8 bits, Huffman codes.
        bare: a JPEG of the tables and scans alone.
        scans: of all components or some, in the order of the file.
    """

    complete: bool = False
    huffman: bool = False
    bare: bytes = b""
    scans: list[Scan] = field(default_factory=list)

    @property
    def has_zero_run(self) -> bool:
        """True if coded data contain a long run of zero bytes."""
        return any(_ZERO_RUN in scan.data for scan in self.scans)

    @property
    def impossible_zero_run(self) -> bool:
        """True if coded data contain a long run of zero bytes, and no encoder could have written them."""
        return any(_ZERO_RUN in scan.data and not scan.zeros for scan in self.scans)

    @classmethod
    def read(cls, content: bytes) -> "JpegScans":
        """Read the markers of a JPEG as far as the file goes."""
        return _Reader(content).read()


class _Reader:
    """Reader of the markers of a JPEG from its beginning to its end mark."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._found = JpegScans()
        self._kept = [_START]
        self._zero_symbols: dict[
            int, int
        ] = {}  # by class and number of a Huffman table: the symbol that zero bits code

    def read(self) -> JpegScans:
        place = len(_START)
        while (place := self._marker(place)) >= 0:
            kind = self._content[place + 1]
            if kind == _END[1]:
                self._found.complete = True
                self._kept.append(_END)
                break
            end = place + 2 + int.from_bytes(self._content[place + 2 : place + 4])
            body = self._content[place + 4 : end]
            if kind == _ADOBE or (kind not in _APPLICATION and kind != _COM):
                self._kept.append(self._content[place:end])
            if kind in _FRAMES:
                self._found.huffman = kind in _CHECKED_FRAMES and body[:1] == b"\x08"
            elif kind == _DHT:
                self._read_tables(body)
            elif kind == _SOS:
                end = self._read_scan(body, end)
            place = end
        self._found.bare = b"".join(self._kept)
        return self._found

    def _marker(self, place: int) -> int:
        """Position of the next marker, which should be at `place`; -1 if there is none."""
        found = _MARKER.search(self._content, place)
        return -1 if found is None else found.start()

    def _read_tables(self, body: bytes) -> None:
        place = 0
        while place + 17 < len(body):
            # Codes are counted by length and assigned in order, so the first symbol has a code of zeros only.
            self._zero_symbols[body[place]] = body[place + 17]
            place += 17 + sum(body[place + 1 : place + 17])

    def _read_scan(self, header: bytes, start: int) -> int:
        """Record the scan whose coded data begin at `start`. Returns the position of the marker that ends it."""
        marker = self._marker(start)
        end = len(self._content) if marker < 0 else marker
        data = self._content[start:end]
        self._kept.append(data)
        self._found.scans.append(Scan(data, self._zeros_continue(header)))
        return end

    def _zeros_continue(self, header: bytes) -> bool:
        """True if zero bits may code large flat parts: no difference of the DC coefficients, all others zero."""
        count = header[0] if header else 0
        if len(header) != 4 + 2 * count:
            return True  # damaged: left to the decoder
        tables = header[2 : 2 + 2 * count : 2]
        first, last, approximation = header[-3:]
        dc = first > 0 or approximation >> 4 or all(self._zero_symbols.get(one >> 4) == 0 for one in tables)
        # Symbols with the size 0: the end of a block, or (progressive) of a band of blocks.
        ac = last == 0 or all(self._zero_symbols.get(0x10 | one & 15, 0) & 15 == 0 for one in tables)
        return bool(dc and ac)
