"""Whose turn it is, against counting turn by turn."""

from collections import Counter
from fractions import Fraction

import pytest

from rdm_scale.data.mixing import Turns, by_size, weighted

SHARES = [
    [Fraction(3)],
    [Fraction(5, 2), Fraction(7, 3), Fraction(1, 9)],
    [Fraction(1, 12), Fraction(1, 5)],  # periods without any turn
    [Fraction(40), Fraction(1)],
]


@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_each_turn_belongs_to_one_lane_which_counts_its_own(shares: list[Fraction]) -> None:
    turns, had = Turns(shares, seed=1), Counter[int]()
    for turn in range(400):
        lane, before = turns.of(turn)
        assert before == had[lane]
        had[lane] += 1


@pytest.mark.parametrize("shares", SHARES[1:], ids=str)
def test_shares_are_exact_at_the_end_of_a_period(shares: list[Fraction]) -> None:
    turns = Turns(shares, seed=1)
    for periods in (1, 2, 7, 90, 1000):
        expected = [int(periods * share) for share in shares]
        dealt = sum(expected)
        # the last turn before the end of the period, and the first one after it
        last = [turns.of(turn) for turn in range(max(0, dealt - 60), dealt)]
        for lane, count in enumerate(expected):
            numbers = [before for which, before in last if which == lane]
            assert not numbers or max(numbers) == count - 1
        lane, before = turns.of(dealt)
        assert before == expected[lane]


def test_weights_are_kept_within_a_turn_everywhere_soon() -> None:
    turns, had = weighted([0.7, 0.2, 0.1], seed=3), Counter[int]()
    for turn in range(6400):
        had[turns.of(turn)[0]] += 1
    assert had == {0: 4480, 1: 1280, 2: 640}
    early = Counter(turns.of(turn)[0] for turn in range(64))
    assert all(abs(early[lane] - 64 * weight) <= 2 for lane, weight in enumerate([0.7, 0.2, 0.1]))


def test_buckets_of_a_source_end_their_epochs_together() -> None:
    sizes, batch = [1000, 130, 24], 16
    turns, had = by_size(sizes, batch, seed=0), Counter[int]()
    for turn in range(sum(3 * size // batch for size in sizes)):
        had[turns.of(turn)[0]] += 1
    for lane, size in enumerate(sizes):
        assert 3 * size - batch < had[lane] * batch <= 3 * size


def test_the_order_differs_between_periods_and_seeds() -> None:
    def lanes(seed: int, first: int) -> list[int]:
        turns = Turns([Fraction(16), Fraction(16)], seed)
        return [turns.of(turn)[0] for turn in range(first, first + 32)]

    assert lanes(0, 0) != lanes(0, 32) != lanes(1, 32)
    assert lanes(0, 0) == lanes(0, 0)


def test_a_turn_far_away_is_found_as_well() -> None:
    shares = [Fraction(5, 2), Fraction(7, 3), Fraction(1, 9)]
    periods = 10**11
    begins = sum(int(periods * share) for share in shares)
    turns = Turns(shares, seed=1)
    dealt = Counter(turns.of(turn)[0] for turn in range(begins, begins + 89))  # 18 periods have 45 + 42 + 2 turns
    assert dealt == {0: 45, 1: 42, 2: 2}
    first = dict(turns.of(turn) for turn in range(begins + 88, begins - 1, -1))
    assert first == {lane: int(periods * share) for lane, share in enumerate(shares)}
