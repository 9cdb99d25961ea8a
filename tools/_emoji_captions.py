"""Captions of emoji as people write them, from Unicode's names: "a woman firefighter with medium skin tone"."""

import re
from collections.abc import Sequence
from itertools import groupby

from rdm_scale.tools._emoji_names import SKIN_TONE, NamedEmoji

_PEOPLE = {
    "person": "people",
    "man": "men",
    "woman": "women",
    "adult": "adults",
    "child": "children",
    "girl": "girls",
    "boy": "boys",
}
_NUMBERS = ("no", "one", "two", "three", "four")
# Names that are no phrases of article and noun.
_WHOLE = {
    "Mrs. Claus": "Mrs. Claus",
    "Santa Claus": "Santa Claus",
    "Statue of Liberty": "the Statue of Liberty",
    "Tokyo tower": "Tokyo tower",
    "ZZZ": "ZZZ",
    "breast-feeding": "a woman breast-feeding a baby",
    "dashing away": "a cloud of dashing away",
    "dizzy": "a dizzy star",
    "dna": "DNA",
    "dvd": "a DVD",
    "flower playing cards": "flower playing cards",
    "foggy": "a bridge in fog",
    "kaaba": "the Kaaba",
    "locked": "a closed lock",
    "locked with key": "a closed lock with a key",
    "locked with pen": "a closed lock with a pen",
    "milky way": "the Milky Way",
    "mount fuji": "Mount Fuji",
    "mx claus": "Mx Claus",
    "rolling on the floor laughing": "a face rolling on the floor laughing",
    "star-struck": "a star-struck face",
    "unlocked": "an open lock",
    "woman’s clothes": "a woman’s clothes",
}
# Nouns without an article, in the singular.
_SINGULAR = """
bacon badminton bowling bread broccoli butter camping candy construction cooking coral cream fire fog food
garlic hockey ice lacrosse liquid luggage meat milk money oden polish pong popcorn racing rice sake
salt skis soap spaghetti sushi tennis voltage wood yarn
"""
_UNCOUNTABLE = frozenset(_SINGULAR.split())
_SINGULAR_S = ("ss", "us", "is", "biceps", "rhinoceros", "wards")  # ends of words that are no plurals
_AFTER_NOUN = re.compile(r" (?:with|without|of|on|over|in|at|up|down|for|behind|from|\w+ing) .*| (?:up|down)$")
_VOWEL = re.compile(r"[aeio]|u(?!ni|ti)|x-|hour|SOS|NG\b|8", re.IGNORECASE)
_CONSONANT = re.compile(r"(?:one\b|eu|1)", re.IGNORECASE)
# What a person has or does: the names leave out the article of the object.
_OBJECT = re.compile(r"\b(with|in|wearing|rowing|bouncing|raising|tipping|getting|taking|feeding) (?!bed$)(.+)")
_PERSON = re.compile(r"(?:deaf |pregnant )?(?:person|man|woman|couple|cat)\b")
_SIGNS = """
arrow arrows asterisk badge box button circle circles cross dash diamond emblem loop mark marks menorah sign square
star symbol triangle wheel
"""
_SIGN_NOUNS = frozenset(_SIGNS.split())
_WITH_THE = re.compile(
    r"United .*|European Union|Isle of .*|U\.S\. .*"
    r"|(?!South Georgia).* (?:Islands|Republic|Territor(?:y|ies)|Netherlands)"
    r"|Netherlands|Philippines|Bahamas|Maldives|Comoros|Seychelles|Gambia"
)


def caption(emoji: NamedEmoji) -> str:
    """Caption of an emoji, a phrase without a full stop."""
    detail = emoji.name.partition(": ")[2]
    if emoji.base == "flag":
        country = detail.replace(" & ", " and ")
        return f"the flag of {'the ' * bool(_WITH_THE.fullmatch(detail))}{country}"
    if emoji.base == "keycap":
        return f"a keycap with the {'number' if detail.isdigit() else 'sign'} {detail}"
    if emoji.subgroup == "time" and re.search(r"o’clock|-thirty", emoji.name):
        return f"a clock at {emoji.name}"
    words = emoji.base.split()
    if emoji.group == "Symbols" and not _SIGN_NOUNS & set(words):
        return f"the {emoji.name} symbol"
    people = [one for one in emoji.qualifiers if one in _PEOPLE]
    traits = [one for one in emoji.qualifiers if one not in _PEOPLE and not one.endswith(SKIN_TONE)]
    subject = _subject(emoji.base, people)
    if "bald" in traits:
        traits.remove("bald")
        subject = subject.replace("a ", "a bald ", 1)
    return _with_traits(subject, _tones(emoji.skin_tones) + [one if "hair" in one else noun(one) for one in traits])


def noun(phrase: str) -> str:
    """A noun phrase with its article, if it takes one: "an owl", "grapes"."""
    if phrase in _WHOLE:
        return _WHOLE[phrase]
    head = _AFTER_NOUN.sub("", phrase).split()[-1]
    plural = head.endswith("s") and not head.endswith(_SINGULAR_S)
    if plural or head.lower() in _UNCOUNTABLE or phrase.startswith(("people ", "men ", "women ")):
        return phrase
    vowel = _VOWEL.match(phrase) and not _CONSONANT.match(phrase)
    return f"{'an' if vowel else 'a'} {phrase}"


def _subject(base: str, people: Sequence[str]) -> str:
    """Phrase for what is shown, before its traits."""
    if base == "kiss":
        return f"a kiss between {_listed(people or ('person', 'person'))}"
    if base == "family" and people:
        return f"a family of {_listed(people)}"
    if _PERSON.match(base):
        base = _OBJECT.sub(lambda found: f"{found[1]} {noun(found[2])}", base)
    return noun(base) + (f", {_listed(people)}" if people else "")


def _listed(people: Sequence[str]) -> str:
    """Enumeration of people: "a man, a woman and two girls"."""
    parts = []
    for one, same in groupby(people):
        number = len(list(same))
        parts.append(f"a {one}" if number == 1 else f"{_NUMBERS[number]} {_PEOPLE[one]}")
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _tones(tones: Sequence[str]) -> list[str]:
    return [f"{' and '.join(tones)} skin tone{'s' * (len(tones) > 1)}"] if tones else []


def _with_traits(subject: str, traits: Sequence[str]) -> str:
    if not traits:
        return subject
    joint = " and " if " with " in subject and ", " not in subject else " with "
    return f"{subject}{joint}{' and '.join(traits)}"
