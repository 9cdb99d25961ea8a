"""Statistics of a set: the same on any number of ranks, and refused where they cannot be compared."""

import dataclasses

import numpy as np
import pytest

from rdm_scale.config import ParallelConfig
from rdm_scale.errors import ConfigError, DataError
from rdm_scale.evaluation.networks import load_network
from rdm_scale.evaluation.sample_sets import ArraySamples
from rdm_scale.evaluation.set_statistics import GIVEN, SetStatistics, Wanted, given_features, measure_set
from tests.support.rank_pool import RankPool

WANTED = Wanted(features=4, probabilities=True)


def samples() -> ArraySamples:
    return ArraySamples(np.random.default_rng(0).integers(0, 256, (13, 8, 8, 3), dtype=np.uint8), "random")


def statistics() -> SetStatistics:
    return measure_set(samples(), load_network("digits", 1), WANTED, option="digits", batch_size=3)


def statistics_of_ranks() -> SetStatistics:
    """Run on each rank."""
    from rdm_scale.parallel.mesh import build_mesh

    mesh = build_mesh(ParallelConfig())
    network = load_network("digits", 1)
    found = measure_set(samples(), network, WANTED, option="digits", batch_size=3, mesh=mesh)
    mesh.shutdown()
    return found


def test_ranks_measure_what_one_process_does(ranks: RankPool) -> None:
    """13 samples in batches of 3: of 2 ranks one has 7 and the other 6."""
    alone = statistics()
    assert alone.features is not None and alone.probabilities is not None and alone.features.shape == (4, 48)
    for found in ranks.run(2, statistics_of_ranks):
        assert (found.samples, found.data, found.identity) == (13, alone.data, alone.identity)
        np.testing.assert_allclose(found.pooled.mean, alone.pooled.mean, rtol=1e-10)
        np.testing.assert_allclose(found.pooled.covariance, alone.pooled.covariance, rtol=1e-10, atol=1e-10)
        assert found.features is not None and np.array_equal(found.features, alone.features)
        assert found.probabilities is not None and np.array_equal(found.probabilities, alone.probabilities)


def test_the_fingerprint_is_of_pixels_whatever_their_order() -> None:
    network = load_network("digits", 1)
    reversed_samples, changed = samples(), samples()
    reversed_samples.array = reversed_samples.array[::-1]
    changed.array[12, 0, 7, 7, 2] ^= 1
    found = [measure_set(one, network, Wanted(), option="digits").data for one in (reversed_samples, changed)]
    assert found[0] == statistics().data != found[1]


@pytest.mark.parametrize("change", [{"network_sha256": "0"}, {"resize": "none"}, {"width": 9}, {"frames": 2}])
def test_sets_of_other_networks_and_preprocessing_are_refused(change: dict[str, object]) -> None:
    identity = statistics().identity
    assert identity is not None
    other = dataclasses.replace(identity, **change)  # type: ignore[arg-type]
    identity.check_comparable(dataclasses.replace(identity), "real", "generated")
    (name,) = change
    with pytest.raises(ConfigError, match=rf"real and generated cannot be compared: {name} .* against {change[name]}"):
        identity.check_comparable(other, "real", "generated")


def test_kept_features_are_of_all_classes() -> None:
    """200 samples in the order of their two classes: of 40 about 20 are of either."""
    x = np.arange(200, dtype=np.float32)[:, None]
    kept = given_features(x, "x", Wanted(features=40)).features
    assert kept is not None and len(np.unique(kept)) == 40 and (np.diff(kept[:, 0]) > 0).all()
    assert 10 <= (kept >= 100).sum() <= 30
    assert np.array_equal(given_features(x, "x", Wanted(features=200)).features, x)


def test_given_features_are_float_arrays() -> None:
    found = given_features(np.eye(3, dtype=np.float32), "x", Wanted(features=2))
    assert found.identity == GIVEN and found.samples == 3 and found.features is not None and len(found.features) == 2
    for array in (np.eye(3, dtype=np.int64), np.zeros(3), np.zeros((0, 3))):
        with pytest.raises(DataError, match=r"features are a float array \[N, D\]"):
            given_features(array, "x", Wanted())
