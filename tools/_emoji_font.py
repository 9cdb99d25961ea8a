"""Bitmaps of emoji in a font: the CBDT table, by the characters that the cmap and the ligatures of GSUB name."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from rdm_scale.errors import DataError

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # where Debian's package puts it
_TABLES = ("CBDT", "CBLC", "GSUB", "cmap", "name")
_VARIATION_SELECTOR = "\ufe0f"  # asks for the colored form, the only one of such a font
_FULL_NAME, _VERSION, _COPYRIGHT, _LICENSE, _LICENSE_URL = 4, 5, 0, 13, 14  # numbers in the table of names


class EmojiFont(NamedTuple):
    """Bitmaps of a font, and what it says of itself."""

    attribution: str  # its name, version, copyright and license, a line each
    characters: Mapping[int, str]  # glyph of each code point
    ligatures: Mapping[tuple[str, ...], str]  # glyph of each sequence of glyphs
    bitmaps: Mapping[str, bytes]  # PNG of each glyph

    def bitmap(self, emoji: str) -> bytes | None:
        """PNG of an emoji of one or more characters; None if the font has none."""
        glyphs = tuple(self.characters.get(ord(one), "") for one in emoji if one != _VARIATION_SELECTOR)
        return self.bitmaps.get(glyphs[0] if len(glyphs) == 1 else self.ligatures.get(glyphs, ""))


def read_font(path: Path) -> EmojiFont:
    """Read a font with color bitmaps.

    Raises:
        DataError: there is no such font, it is damaged, or its emoji are no bitmaps.
    """
    from fontTools.ttLib import TTFont  # slow to import, and not needed for --help

    if not path.is_file():
        raise DataError(f"no emoji font at {path}: apt-get install fonts-noto-color-emoji, or --font PATH")
    try:
        with TTFont(path) as font:
            missing = [table for table in _TABLES if table not in font]
            if not missing:
                return _read(font)
    except Exception as error:  # fontTools raises many kinds where a table is damaged
        raise DataError(f"the font {path} cannot be read ({error}): get it anew, or --font PATH") from error
    raise DataError(
        f"the font {path} has no color bitmaps (no table {missing[0]}): take NotoColorEmoji.ttf of Debian's "
        "fonts-noto-color-emoji, or another font with CBDT, by --font PATH"
    )


def _read(font: Any) -> EmojiFont:
    sizes = [strike.bitmapSizeTable.ppemY for strike in font["CBLC"].strikes]
    largest = font["CBDT"].strikeData[sizes.index(max(sizes))]
    named = [font["name"].getDebugName(n) for n in (_FULL_NAME, _VERSION, _COPYRIGHT, _LICENSE, _LICENSE_URL)]
    return EmojiFont(
        "\n".join(line for line in named if line),
        font.getBestCmap(),
        _ligatures(font),
        {glyph: bitmap.imageData for glyph, bitmap in largest.items() if hasattr(bitmap, "imageData")},
    )


def _ligatures(font: Any) -> dict[tuple[str, ...], str]:
    found = {}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            table = getattr(table, "ExtSubTable", table)
            for first, ligatures in getattr(table, "ligatures", {}).items():
                found.update({(first, *ligature.Component): ligature.LigGlyph for ligature in ligatures})
    return found


def draw(bitmap: bytes, size: int) -> bytes:
    """PNG [size, size] in RGB: a bitmap in the middle of a white square, scaled to `size` pixels."""
    with Image.open(io.BytesIO(bitmap)) as opened:
        picture = opened.convert("RGBA")
    side = max(picture.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    buffer = io.BytesIO()
    square.convert("RGB").resize((size, size), Image.Resampling.LANCZOS).save(buffer, "PNG")
    return buffer.getvalue()
