"""Places of ranks in the store in which they meet."""

import pytest
import torch.distributed as dist

from rdm_scale.errors import LaunchError
from rdm_scale.parallel import rendezvous


def place(rank: int) -> rendezvous._Place:
    return rendezvous._Place(rank, 2, ("localhost", 1), "prefix", timeout_s=0.0, stop=None)


def test_a_rank_that_comes_again_keeps_its_place_and_counts_once() -> None:
    store, first = dist.HashStore(), place(0)
    for _ in range(2):  # as after a connection that broke
        rendezvous._take_place(store, first)
    with pytest.raises(LaunchError, match="rank 1 of 2 did not come"):
        rendezvous._wait_for_all(store, first)
    rendezvous._take_place(store, place(1))
    assert rendezvous._wait_for_all(store, first).ranges[-1].last == 1


def test_another_process_of_the_same_rank_is_turned_away() -> None:
    store = dist.HashStore()
    rendezvous._take_place(store, place(0))
    with pytest.raises(rendezvous._NotYet, match="is rank 0 already"):
        rendezvous._take_place(store, place(0))
