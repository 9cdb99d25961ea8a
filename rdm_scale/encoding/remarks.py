"""Remarks on inputs that are encoded although something about them could not be used, counted by kind."""

from collections.abc import Iterator
from typing import NamedTuple


class Remark(NamedTuple):
    """Number of samples that a remark applies to, and the name of one of them."""

    number: int
    example: str


class Remarks:
    """Tally of remarks by their text. Not safe for several threads at once: give each its own, then add them up."""

    def __init__(self, found: dict[str, Remark] | None = None) -> None:
        self.found: dict[str, Remark] = dict(found or {})

    def __iter__(self) -> Iterator[str]:
        """Yield one line per kind of remark: what, how often, and an example."""
        for text, (number, example) in sorted(self.found.items()):
            yield f"{text}: {number} {'sample' if number == 1 else 'samples'}, for example {example}"

    def add(self, text: str, name: str) -> None:
        """Count a remark on the input `name`, once even if it is repeated."""
        if text not in self.found or self.found[text].example != name:
            self.include({text: Remark(1, name)})

    def include(self, found: dict[str, Remark]) -> None:
        """Add the counts of other remarks; the first example stays."""
        for text, remark in found.items():
            before = self.found.get(text)
            self.found[text] = remark if before is None else Remark(before.number + remark.number, before.example)
