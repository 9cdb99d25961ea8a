"""Write the emoji of a font as a captioned webdataset tar: real pictures with words, without a download.

The emoji are those of Noto Color Emoji, over white, and the captions are made from Unicode's names: "a woman
firefighter with medium skin tone". Debian and Ubuntu have both: apt-get install fonts-noto-color-emoji unicode-data.
Emoji of people are combinations of a role (a profession, gesture or activity), a person and a skin tone. A fifth of the
combinations go to a second tar, so that a model which is trained on the first has never seen them.

The tars hold the licenses and, in Unicode's order, `KEY.png`, `KEY.txt` (the caption) and `KEY.json` (name, groups and
attributes), where KEY are the code points. The same font, names and versions of the libraries write the same bytes.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rdm_scale.config.paths import any_option, local_option
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location
from rdm_scale.storage.ustar import pack_ustar
from rdm_scale.tools._emoji_captions import caption
from rdm_scale.tools._emoji_font import FONT, draw, read_font
from rdm_scale.tools._emoji_names import NAMES, Combination, NamedEmoji, combinations, hold_out, read_names

_LICENSES = Path(__file__).with_name("emoji_licenses.txt")
_SIZES = (16, 128)  # the least, and the most that the bitmaps of the font hold


class EmojiSet(NamedTuple):
    """Emoji with their pictures, divided into those to train on and those held out."""

    names: Sequence[NamedEmoji]  # that the font has
    not_in_font: Sequence[NamedEmoji]
    pictures: Mapping[str, bytes]  # PNG by key
    combinations: Mapping[str, Combination]  # attributes by key
    held_out: set[str]  # keys
    notice: bytes  # licenses and attribution

    def tar(self, held_out: bool) -> bytes:
        """The tar of one side of the split."""
        files = [("LICENSE", self.notice)]
        for emoji in self.names:
            if (emoji.key in self.held_out) == held_out:
                files.append((f"{emoji.key}.png", self.pictures[emoji.key]))
                files.append((f"{emoji.key}.txt", caption(emoji).encode()))
                files.append((f"{emoji.key}.json", self._annotation(emoji)))
        return pack_ustar(files).content

    def _annotation(self, emoji: NamedEmoji) -> bytes:
        values = {"emoji": emoji.characters, "name": emoji.name, "group": emoji.group, "subgroup": emoji.subgroup}
        attributes = self.combinations.get(emoji.key)
        if attributes:
            values |= attributes._asdict()
        return json.dumps(values, ensure_ascii=False).encode()


def read_emoji(font_path: Path, names_path: Path, size: int) -> EmojiSet:
    """Read and draw all emoji.

    Args:
        font_path: a font with color bitmaps.
        names_path: Unicode's emoji-test.txt.
        size: side of the pictures, in pixels.

    Raises:
        DataError: a file is missing or not what it should be, or the font has none of the emoji.
    """
    names = read_names(names_path)
    font = read_font(font_path)
    bitmaps = {emoji.key: font.bitmap(emoji.characters) for emoji in names}
    pictures = {key: draw(bitmap, size) for key, bitmap in bitmaps.items() if bitmap}
    if not pictures:
        raise DataError(f"the font {font_path} has none of the {len(names)} emoji of {names_path}: give another --font")
    present = [emoji for emoji in names if emoji.key in pictures]
    known = combinations(present)
    missing = [emoji for emoji in names if emoji.key not in pictures]
    notice = _notice(font.attribution, names_path, size)
    return EmojiSet(present, missing, pictures, known, hold_out(known, pictures), notice)


def _notice(attribution: str, names_path: Path, size: int) -> bytes:
    credit = [line.lstrip("# ") for line in names_path.read_text("utf-8", errors="replace").splitlines() if "©" in line]
    lines = [
        f"The pictures are bitmaps of a font, set over white and scaled to {size} x {size} pixels. The font says:",
        attribution,
        f"The captions are made from the names in Unicode's {names_path.name}. {' '.join(credit[:1])}",
    ]
    return ("\n\n".join(lines) + "\n\n" + _LICENSES.read_text("utf-8")).encode()


def main() -> int:
    options = _parse_options()
    output = Location(options.output)
    stem = output.name.removesuffix(".tar")
    holdout = Location(options.holdout) if options.holdout else output.parent / f"{stem}-holdout.tar"
    try:
        emoji = read_emoji(Path(options.font), Path(options.names), options.size)
    except (DataError, OSError) as error:
        print(f"make_emoji: error: {error}", file=sys.stderr)
        return 1
    try:
        for location, held_out in ((output, False), (holdout, True)):
            location.parent.make_dir()
            location.write(emoji.tar(held_out))
    except OSError as error:
        print(f"make_emoji: error: cannot write {location}: {error}", file=sys.stderr)
        return 1
    if emoji.not_in_font:
        print(f"note: {len(emoji.not_in_font)} emoji are not in the font (the first: {emoji.not_in_font[0].name})")
    print(f"wrote {output}: {len(emoji.names) - len(emoji.held_out)} emoji")
    print(f"wrote {holdout}: {len(emoji.held_out)} of {len(emoji.combinations)} combinations, for evaluation only")
    return 0


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "output", metavar="OUTPUT.tar", type=any_option, help="where to write it (a path or any fsspec URL)"
    )
    parser.add_argument(
        "--holdout", metavar="PATH", type=any_option, help="the held-out emoji (default: OUTPUT-holdout.tar)"
    )
    parser.add_argument(
        "--font", metavar="PATH", type=local_option, default=FONT, help="with table CBDT (default: %(default)s)"
    )
    parser.add_argument(
        "--names", metavar="PATH", type=local_option, default=NAMES, help="emoji-test.txt (default: %(default)s)"
    )
    parser.add_argument("--size", type=int, default=64, help="pixels a side (default: %(default)s)")
    options = parser.parse_args()
    if not _SIZES[0] <= options.size <= _SIZES[1]:
        parser.error(f"--size must be from {_SIZES[0]} to {_SIZES[1]}, the size of the font's bitmaps")
    return options


if __name__ == "__main__":
    sys.exit(main())
