"""Names of emoji in Unicode's emoji-test.txt, attributes of the people in them, and a hold-out by attributes."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from rdm_scale.errors import DataError

NAMES = Path("/usr/share/unicode/emoji/emoji-test.txt")  # where Debian's package puts it
HOLDOUT_SHARE = 0.2  # of the combinations
SKIN_TONE = " skin tone"
DEFAULT_TONE = "default"  # yellow, of emoji that name no tone
_LINE = re.compile(r"([0-9A-F ]+?) *; fully-qualified *# \S+ E[\d.]+ (.+)")
_PERSON = re.compile(r"(?:(deaf|pregnant) )?(person|man|woman)(?: (.+))?")
_IRREGULAR = {
    "merperson": ("merfolk", "person"),
    "merman": ("merfolk", "man"),
    "mermaid": ("merfolk", "woman"),
    "older person": ("old", "person"),
    "old man": ("old", "man"),
    "old woman": ("old", "woman"),
}


class NamedEmoji(NamedTuple):
    """An emoji and what Unicode says of it."""

    characters: str
    name: str  # "woman firefighter: medium skin tone"
    group: str = ""  # "People & Body"
    subgroup: str = ""  # "person-role"

    @property
    def key(self) -> str:
        """The code points, as the key of a sample."""
        return "-".join(f"{ord(one):04x}" for one in self.characters)

    @property
    def base(self) -> str:
        """The name without qualifiers."""
        return self.name.partition(": ")[0]

    @property
    def qualifiers(self) -> list[str]:
        """Skin tones, hair, members of a family and so on; in a keycap or flag the whole rest of the name."""
        return self.name.split(": ", 1)[1].split(", ") if ": " in self.name else []

    @property
    def skin_tones(self) -> list[str]:
        """The tones it names, without the words "skin tone"."""
        return [one.removesuffix(SKIN_TONE) for one in self.qualifiers if one.endswith(SKIN_TONE)]


class Combination(NamedTuple):
    """Attributes of an emoji of one person."""

    role: str  # profession, gesture, activity or hair: "firefighter", "shrugging", "red hair"
    person: str  # "person", "man" or "woman"
    skin_tone: str  # "light", ..., "dark", or DEFAULT_TONE

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Each two of its attributes, as keys; no value belongs to two attributes."""
        return ((self.role, self.person), (self.role, self.skin_tone), (self.person, self.skin_tone))


def read_names(path: Path) -> list[NamedEmoji]:
    """Read emoji-test.txt: all fully-qualified emoji in its order (CLDR's).

    Raises:
        DataError: there is no such file, or it names no emoji.
    """
    if not path.is_file():
        raise DataError(f"no names of emoji at {path}: apt-get install unicode-data, or --names PATH (emoji-test.txt)")
    found, heading = [], {"group": "", "subgroup": ""}
    for line in path.read_text("utf-8", errors="replace").splitlines():
        kind, _, title = line.removeprefix("# ").partition(": ")
        if line.startswith("#") and kind in heading:
            heading[kind] = title.strip()
        elif match := _LINE.fullmatch(line):
            characters = "".join(chr(int(code, 16)) for code in match[1].split())
            found.append(NamedEmoji(characters, match[2], **heading))
    if not found:
        raise DataError(f"{path} names no fully-qualified emoji: take Unicode's emoji-test.txt, by --names PATH")
    return found


def combinations(names: Iterable[NamedEmoji]) -> dict[str, Combination]:
    """Attributes of emoji that show one person, by the key of the emoji.

    A role counts where at least two kinds of persons have it, in at least two skin tones.
    """
    people = [one for one in names if one.group == "People & Body" and len(one.skin_tones) <= 1]
    bases = {one.base for one in people}
    found = {one.key: attributes for one in people if (attributes := _attributes(one, bases))}
    persons, tones = defaultdict(set), defaultdict(set)
    for role, person, tone in found.values():
        persons[role].add(person)
        tones[role].add(tone)
    return {key: one for key, one in found.items() if min(len(persons[one.role]), len(tones[one.role])) > 1}


def _attributes(emoji: NamedEmoji, bases: Collection[str]) -> Combination | None:
    """Attributes of an emoji; None for a person without a role, and for what is no person."""
    base = emoji.base
    others = [one for one in emoji.qualifiers if not one.endswith(SKIN_TONE)]
    if base in _IRREGULAR:
        role, person = _IRREGULAR[base]
    elif match := _PERSON.fullmatch(base):
        role, person = " ".join(part for part in (match[1], match[3]) if part), match[2]
    elif f"man {base}" in bases:
        role, person = base, "person"
    else:
        return None
    role = ", ".join([role, *others] if role else others)
    return Combination(role, person, (emoji.skin_tones or [DEFAULT_TONE])[0]) if role else None


def hold_out(known: Mapping[str, Combination], pictures: Mapping[str, bytes]) -> set[str]:
    """Keys of the emoji that are held out: a fifth of the combinations, chosen by a hash of their attributes.

    Each role gives at most a fifth of its combinations, rounded up. Each two attributes of a held-out combination occur
    together in one that is not held out. A picture that several emoji share is never held out.

    Args:
        known: attributes by key.
        pictures: of all emoji, by key.
    """
    from rdm_scale import rng  # imports torch, which --help does not need

    copies = Counter(pictures.values())
    left = Counter(pair for one in known.values() for pair in one.pairs)
    room = {role: math.ceil(HOLDOUT_SHARE * n) for role, n in Counter(one.role for one in known.values()).items()}
    chosen: set[str] = set()
    for key in sorted(known, key=lambda key: (rng.key(0, "holdout", *known[key]), key)):
        if len(chosen) == round(HOLDOUT_SHARE * len(known)):
            break
        role, pairs = known[key].role, known[key].pairs
        if copies[pictures[key]] == 1 and room[role] and min(left[pair] for pair in pairs) > 1:
            left.subtract(pairs)
            room[role] -= 1
            chosen.add(key)
    return chosen
