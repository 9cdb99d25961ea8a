"""Whose turn it is: several sources, or the buckets of one, take steps in given shares, in closed form.

The turns come in periods. Lane b with the share q_b of turns a period has floor((e + 1) q_b) - floor(e q_b) turns in
period e, so that after any number of whole periods it has had its exact share, rounded down, and what is left of a turn
is carried over. Within a period the lanes take their turns in an order that belongs to (seed, period). Buckets have
q = samples / batch size, which makes a period an epoch of their source; weighted sources have q in proportion to their
weights. Which lane has turn k, and how many turns it had before, follows from k alone.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from rdm_scale import rng
from rdm_scale.data.order import Indices, permutation

_TURNS_A_PERIOD = 64  # of weighted sources: in so many turns every weight is kept to within one turn
_FINEST_WEIGHT = 10**6  # weights are taken as fractions with no larger denominator


class Turns:
    """Deals turns 0, 1, 2, ... to lanes.

    Args:
        shares: turns of each lane a period; positive.
        seed: of the order within a period.
    """

    def __init__(self, shares: Sequence[Fraction], seed: int) -> None:
        self._shares, self._seed = list(shares), seed
        self._period = lru_cache(maxsize=2)(self._make_period)

    def of(self, turn: int) -> tuple[int, int]:
        """(lane, the number of turns that it had before)."""
        if len(self._shares) == 1:
            return 0, turn
        period = self._period_of(turn)
        before = [self._had(lane, period) for lane in range(len(self._shares))]
        lanes, earlier = self._period(period)
        at = turn - sum(before)
        return int(lanes[at]), before[int(lanes[at])] + int(earlier[at])

    def _had(self, lane: int, periods: int) -> int:
        share = self._shares[lane]
        return periods * share.numerator // share.denominator

    def _begins(self, period: int) -> int:
        return sum(self._had(lane, period) for lane in range(len(self._shares)))

    def _period_of(self, turn: int) -> int:
        """The period e with begins(e) <= turn < begins(e + 1), by bisection: each lane lacks less than one turn."""
        total = sum(self._shares, Fraction(0))
        low, high = int(turn / total), int((turn + len(self._shares) + 1) / total) + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._begins(middle) <= turn else (low, middle)
        return low

    def _make_period(self, period: int) -> tuple[Indices, Indices]:
        """The lane of each turn of a period, and how many turns of the period that lane had before."""
        lanes = range(len(self._shares))
        counts = [self._had(lane, period + 1) - self._had(lane, period) for lane in lanes]
        order = permutation(rng.key(self._seed, "turns", period), sum(counts))
        dealt = np.repeat(np.arange(len(counts)), counts)[order]
        earlier = np.empty_like(dealt)
        for lane in lanes:
            earlier[dealt == lane] = np.arange(counts[lane])
        return dealt, earlier


def weighted(weights: Sequence[float], seed: int) -> Turns:
    """Turns in proportion to weights."""
    fractions = [Fraction(weight).limit_denominator(_FINEST_WEIGHT) for weight in weights]
    total = sum(fractions)
    return Turns([_TURNS_A_PERIOD * fraction / total for fraction in fractions], seed)


def by_size(samples: Sequence[int], batch_size: int, seed: int) -> Turns:
    """Turns of buckets with so many samples each: a period is an epoch of all of them together."""
    return Turns([Fraction(count, batch_size) for count in samples], seed)
