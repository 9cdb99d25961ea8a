"""Bootstrap intervals hold the truth about as often as they say."""

import numpy as np
import pytest

from rdm_scale.scaling.intervals import bootstrap_laws, interval, intervals_of, prediction_interval
from rdm_scale.scaling.law import fit_law
from rdm_scale.scaling.observations import Observations
from tests.scaling.test_law import CHINCHILLA, isoflop_runs

NUMBERS = ("E", "A", "B", "alpha", "beta")


def test_interval_is_between_percentiles() -> None:
    found = interval(np.arange(101.0))
    assert (found.low, found.high) == pytest.approx((5, 95))


def test_noise_widens_intervals_and_seeds_repeat_them() -> None:
    runs = isoflop_runs(CHINCHILLA, noise=0.01)
    law = fit_law(runs, searches=2).law
    laws = bootstrap_laws(runs, law, 12, seed=3)
    assert laws == bootstrap_laws(runs, law, 12, seed=3)
    assert np.std([each.alpha for each in laws]) > 1e-3
    exact = isoflop_runs(CHINCHILLA)
    for each in bootstrap_laws(exact, CHINCHILLA, 3):
        assert each.alpha == pytest.approx(0.34, rel=1e-5)


def test_whole_sizes_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of one size stay together, as they share what is wrong with it; three sizes are always left."""
    from rdm_scale.scaling import intervals

    drawn = []
    monkeypatch.setattr(intervals, "_refit", lambda runs, law, rows: drawn.append(rows) or law)
    sizes = np.repeat([1e6, 2e6, 4e6, 8e6], 6)
    runs = Observations(sizes, np.tile(np.repeat([1e8, 2e8, 4e8], 2), 4), np.linspace(3, 2, 24))
    bootstrap_laws(runs, CHINCHILLA, 50)
    for rows in drawn:
        counts = [int((sizes[rows] == size).sum()) for size in np.unique(sizes)]
        assert all(count % 6 == 0 for count in counts) and sum(counts) == 24
        assert sum(count > 0 for count in counts) >= 3


def test_prediction_interval_of_more_runs_is_narrower() -> None:
    runs = isoflop_runs(CHINCHILLA, noise=0.02)
    law = fit_law(runs, searches=2).law
    one, many = (prediction_interval([law] * 50, law, runs, 1e9, 1e10, runs=count) for count in (1, 16))
    assert (many.high - many.low) / (one.high - one.low) == pytest.approx(0.25, rel=0.25)
    assert one.low < law.loss(1e9, 1e10) < one.high


@pytest.mark.full
def test_intervals_hold_the_truth_in_nine_of_ten() -> None:
    repetitions, hits = 200, dict.fromkeys(NUMBERS, 0)
    for seed in range(repetitions):
        runs = isoflop_runs(CHINCHILLA, noise=0.01, seed=seed)
        laws = bootstrap_laws(runs, fit_law(runs, searches=3).law, 100, seed=seed)
        found = intervals_of(laws, {name: lambda law, name=name: getattr(law, name) for name in NUMBERS})
        for name in NUMBERS:
            hits[name] += found[name].low <= getattr(CHINCHILLA, name) <= found[name].high
    for name, count in hits.items():
        assert 0.85 <= count / repetitions <= 0.95, (name, count)
