"""Assignment of steps to sources, and to the buckets of a source: exact shares in closed form.

Steps are the slots of a schedule, and each slot is assigned to one of several choices: a source, or one of the buckets
of a source. Slots come in periods. A choice with share q of the slots per period gets
floor((e + 1) q) - floor(e q) slots in period e, so after any number of periods it has had its exact share, rounded
down, and the remainder is carried over. The order of slots within a period is a permutation keyed by (seed, period).

Buckets have q = samples / batch size, which makes a period one epoch of their source; sources have q in proportion to
their weights. The choice of slot k, and how many slots that choice had before, follow from k alone.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from rdm_scale import rng
from rdm_scale.data.order import Indices, permutation

_WEIGHTED_PERIOD = 64  # slots per period of weighted sources, over which weights are exact to within one slot
_LARGEST_DENOMINATOR = 10**6  # of the fractions that approximate the weights


class SlotAssignment(NamedTuple):
    """The choice that a slot belongs to, and the number of earlier slots of the same choice."""

    choice: int
    ordinal: int


class _Period(NamedTuple):
    """Assignments of the slots of one period; ordinals count from the start of the period."""

    choices: Indices
    ordinals: Indices


class SlotSchedule:
    """Schedule that assigns slots 0, 1, 2, ... to choices in given shares.

    Args:
        shares: slots per period of each choice; positive.
        seed: seed of the order within each period.
    """

    def __init__(self, shares: Sequence[Fraction], seed: int) -> None:
        self._shares, self._seed = list(shares), seed
        self._period = lru_cache(maxsize=2)(self._make_period)

    def assign(self, slot: int) -> SlotAssignment:
        """Assign one slot, in time logarithmic in its number."""
        if len(self._shares) == 1:
            return SlotAssignment(0, slot)
        number = self._period_of(slot)
        before = [self._slots_before(choice, number) for choice in range(len(self._shares))]
        period, index = self._period(number), slot - sum(before)
        choice = int(period.choices[index])
        return SlotAssignment(choice, before[choice] + int(period.ordinals[index]))

    def _slots_before(self, choice: int, period: int) -> int:
        """Number of slots of a choice before the start of a period."""
        share = self._shares[choice]
        return period * share.numerator // share.denominator

    def _first_slot(self, period: int) -> int:
        return sum(self._slots_before(choice, period) for choice in range(len(self._shares)))

    def _period_of(self, slot: int) -> int:
        """The period e with first_slot(e) <= slot < first_slot(e + 1), by bisection.

        Rounding down takes less than one slot from each choice, which bounds e from both sides.
        """
        total = sum(self._shares, Fraction(0))
        low, high = int(slot / total), int((slot + len(self._shares) + 1) / total) + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._first_slot(middle) <= slot else (low, middle)
        return low

    def _make_period(self, period: int) -> _Period:
        numbers = range(len(self._shares))
        counts = [self._slots_before(choice, period + 1) - self._slots_before(choice, period) for choice in numbers]
        order = permutation(rng.key(self._seed, "turns", period), sum(counts))
        choices = np.repeat(np.arange(len(counts)), counts)[order]
        ordinals = np.empty_like(choices)
        for choice in numbers:
            ordinals[choices == choice] = np.arange(counts[choice])
        return _Period(choices, ordinals)


def schedule_by_weight(weights: Sequence[float], seed: int) -> SlotSchedule:
    """Assign slots in proportion to weights."""
    fractions = [Fraction(weight).limit_denominator(_LARGEST_DENOMINATOR) for weight in weights]
    total = sum(fractions)
    return SlotSchedule([_WEIGHTED_PERIOD * fraction / total for fraction in fractions], seed)


def schedule_by_size(samples: Sequence[int], batch_size: int, seed: int) -> SlotSchedule:
    """Assign slots to buckets in proportion to their numbers of samples; a period is one epoch of all of them."""
    return SlotSchedule([Fraction(count, batch_size) for count in samples], seed)
