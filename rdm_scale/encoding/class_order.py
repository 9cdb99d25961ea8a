"""Labels of classes: which number each class name of a set gets."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from rdm_scale.errors import DataError

ClassOrder = Literal["text", "numeric"]
MAX_CLASSES = 1_000_000
_NUMBER = re.compile(r"([0-9]{1,18})")


class NumberedClasses(NamedTuple):
    """Labels of class names.

    Attributes:
        labels: of the given names, in their order.
        names: of all labels.
        notes: what a user should know about how they were numbered.
    """

    labels: list[int]
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def number_classes(
    names: Sequence[str], where: str, example: Callable[[int], str], *, numbers: bool, order: ClassOrder | None
) -> NumberedClasses:
    """Number the classes of a set.

    Args:
        names: distinct class names.
        where: the input, for messages.
        example: name of a file of the class with this index in `names`, for messages.
        numbers: True if names that are all numbers are the labels themselves.
        order: of names; None: as text, unless most of the classes that may be numbers are numbers.

    Raises:
        DataError: a number is too large, or most names are numbers and some are not.
    """
    numeric = [name.isascii() and name.isdigit() for name in names]
    if numbers and all(numeric):
        if max(map(len, names)) > len(str(MAX_CLASSES)) or max(map(int, names)) >= MAX_CLASSES:
            raise DataError(f"{where}: a class number is not below {MAX_CLASSES}: number the classes from 0 on")
        labels = list(map(int, names))
        return NumberedClasses(labels, tuple(str(i) for i in range(max(labels) + 1)))
    notes = []
    if numbers and any(numeric) and order is None:
        odd = numeric.index(False)
        mixed = f"{sum(numeric)} of {len(names)} classes are numbers, but {names[odd]!r} ({example(odd)}) is not"
        if sum(numeric) > len(names) / 2:
            raise DataError(
                f"{where}: {mixed}: correct it, or give --class-order text to take "
                "all as names, numbered in their order"
            )
        notes.append(f"{mixed}: all are taken as names, numbered in their order")
    ordered = sorted(names, key=_by_number if order == "numeric" else None)
    if order is None and ordered != (by_number := sorted(names, key=_by_number)):
        first, second = next(pair for pair in zip(ordered, by_number, strict=True) if pair[0] != pair[1])
        notes.append(
            f"classes are numbered in the order of their names as text, {first!r} before {second!r}; "
            "--class-order numeric takes numbers in names by their value"
        )
    notes += _similar(ordered)
    index = {name: i for i, name in enumerate(ordered)}
    return NumberedClasses([index[name] for name in names], tuple(ordered), tuple(notes))


def _by_number(name: str) -> tuple[list[str | int], str]:
    """Sort key that takes numbers in a name by their value."""
    parts = _NUMBER.split(name)  # text and numbers in turn
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def _similar(names: Sequence[str]) -> list[str]:
    """Note on the first two names that differ in case or in the form of their Unicode characters only."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)
        if other != name:
            return [
                f"{other!r} and {name!r} are two classes, although their names differ in case or form only; rename one "
                "if they are the same"
            ]
    return []
