"""Ranks meet although a connection breaks."""

import os

from tests.support.limits import HANG_S
from tests.support.rank_pool import RankPool


def meet_after_a_break() -> tuple[int, int]:
    """Run on each rank: the connection of the last one breaks once it has its place. Breaks, and the ranks that met."""
    import torch.distributed as dist

    from rdm_scale.parallel.rendezvous import meet

    original, breaks = dist.PrefixStore, 0

    class Breaking(original):  # type: ignore[misc, valid-type]
        def check(self, keys: list[str]) -> bool:
            nonlocal breaks
            if os.environ["RANK"] == "1" and not breaks:
                breaks += 1
                raise dist.DistNetworkError("Connection reset by peer")
            return bool(super().check(keys))

    dist.PrefixStore = Breaking  # type: ignore[misc]
    try:
        met = meet(HANG_S)
        if os.environ["RANK"] == "1":
            met.store.set("met", "")
        else:  # this one hosts the store
            met.store.wait(["met"])
        return breaks, met.hosts.ranges[-1].last + 1
    finally:
        dist.PrefixStore = original  # type: ignore[misc]


def test_a_rank_whose_connection_breaks_takes_its_place_again(ranks: RankPool) -> None:
    assert ranks.run(2, meet_after_a_break) == [(0, 2), (1, 2)]
