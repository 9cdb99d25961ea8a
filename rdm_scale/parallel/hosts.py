"""Hosts of the ranks, for messages that name them."""

import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class HostRanks(NamedTuple):
    """Adjacent ranks of one host."""

    host: str
    first: int
    last: int


class Hosts:
    """Host of every rank, kept as ranges."""

    def __init__(self, ranges: Iterable[HostRanks]) -> None:
        self.ranges = tuple(ranges)

    @staticmethod
    def of(hosts: Sequence[str]) -> "Hosts":
        """Hosts of the ranks 0, 1, ..."""
        ranges: list[HostRanks] = []
        for rank, host in enumerate(hosts):
            if ranges and ranges[-1].host == host:
                ranges[-1] = HostRanks(host, ranges[-1].first, rank)
            else:
                ranges.append(HostRanks(host, rank, rank))
        return Hosts(ranges)

    @staticmethod
    def from_json(content: bytes) -> "Hosts":
        return Hosts(HostRanks(*entry) for entry in json.loads(content))

    def to_json(self) -> str:
        return json.dumps(self.ranges)

    @property
    def several(self) -> bool:
        """True if the ranks are on more than one host."""
        return len({each.host for each in self.ranges}) > 1

    def describe(self, ranks: Iterable[int]) -> str:
        """Phrase such as `node2 (ranks 2-3) and node7 (rank 12)`."""
        wanted, parts = set(ranks), []
        for host, first, last in self.ranges:
            here = [rank for rank in range(first, last + 1) if rank in wanted]
            if here:
                parts.append(f"{host} ({rank_list(here)})")
        return " and ".join(parts) or "no rank"


def rank_list(ranks: Sequence[int]) -> str:
    """Short phrase for ascending ranks: `rank 3`, `ranks 0-2, 5`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    names = [str(low) if low == high else f"{low}-{high}" for low, high in spans]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(names)
