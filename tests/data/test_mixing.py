"""Schedules of slots, against counting slot by slot."""

from collections import Counter
from fractions import Fraction

import pytest

from rdm_scale.data.mixing import SlotSchedule, schedule_by_size, schedule_by_weight

SHARES = [
    [Fraction(3)],
    [Fraction(5, 2), Fraction(7, 3), Fraction(1, 9)],
    [Fraction(1, 12), Fraction(1, 5)],  # periods without any slot
    [Fraction(40), Fraction(1)],
]


@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_each_slot_belongs_to_one_choice_and_is_counted_by_it(shares: list[Fraction]) -> None:
    schedule, counts = SlotSchedule(shares, seed=1), Counter[int]()
    for slot in range(400):
        choice, before = schedule.assign(slot)
        assert before == counts[choice]
        counts[choice] += 1


@pytest.mark.parametrize("shares", SHARES[1:], ids=str)
def test_shares_are_exact_at_the_end_of_a_period(shares: list[Fraction]) -> None:
    schedule = SlotSchedule(shares, seed=1)
    for periods in (1, 2, 7, 90, 1000):
        expected = [int(periods * share) for share in shares]
        assigned = sum(expected)
        # the last slots before the end of the period, and the first one after it
        last = [schedule.assign(slot) for slot in range(max(0, assigned - 60), assigned)]
        for choice, count in enumerate(expected):
            numbers = [before for other, before in last if other == choice]
            assert not numbers or max(numbers) == count - 1
        choice, before = schedule.assign(assigned)
        assert before == expected[choice]


def test_weights_are_exact_per_period_and_close_within_it() -> None:
    schedule, counts = schedule_by_weight([0.7, 0.2, 0.1], seed=3), Counter[int]()
    for slot in range(6400):
        counts[schedule.assign(slot).choice] += 1
    assert counts == {0: 4480, 1: 1280, 2: 640}
    early = Counter(schedule.assign(slot).choice for slot in range(64))
    assert all(abs(early[choice] - 64 * weight) <= 2 for choice, weight in enumerate([0.7, 0.2, 0.1]))


def test_buckets_of_a_source_end_their_epochs_together() -> None:
    sizes, batch = [1000, 130, 24], 16
    schedule, counts = schedule_by_size(sizes, batch, seed=0), Counter[int]()
    for slot in range(sum(3 * size // batch for size in sizes)):
        counts[schedule.assign(slot).choice] += 1
    for choice, size in enumerate(sizes):
        assert 3 * size - batch < counts[choice] * batch <= 3 * size


def test_the_order_differs_between_periods_and_seeds() -> None:
    def choices(seed: int, start: int) -> list[int]:
        schedule = SlotSchedule([Fraction(16), Fraction(16)], seed)
        return [schedule.assign(slot).choice for slot in range(start, start + 32)]

    assert choices(0, 0) != choices(0, 32) != choices(1, 32)
    assert choices(0, 0) == choices(0, 0)


def test_a_distant_slot_is_assigned_correctly() -> None:
    shares = [Fraction(5, 2), Fraction(7, 3), Fraction(1, 9)]
    periods = 10**11
    first = sum(int(periods * share) for share in shares)
    schedule = SlotSchedule(shares, seed=1)
    # 18 periods have 45 + 42 + 2 slots.
    assigned = Counter(schedule.assign(slot).choice for slot in range(first, first + 89))
    assert assigned == {0: 45, 1: 42, 2: 2}
    earliest = dict(schedule.assign(slot) for slot in range(first + 88, first - 1, -1))
    assert earliest == {choice: int(periods * share) for choice, share in enumerate(shares)}


def test_the_schedule_never_changes() -> None:
    """Literal choices of a fixed seed: runs that were started by earlier releases continue with the same sources."""
    schedule = schedule_by_weight([3, 1.5, 2], seed=2)
    assert [schedule.assign(slot).choice for slot in range(1000, 1016)] == [
        0,
        0,
        1,
        2,
        0,
        2,
        0,
        2,
        2,
        2,
        1,
        2,
        2,
        0,
        2,
        0,
    ]
