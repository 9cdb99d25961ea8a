"""Names, lines and warnings of measurements."""

import dataclasses

import numpy as np
import pytest

from rdm_scale.errors import ConfigError
from rdm_scale.evaluation.feature_moments import Gaussian
from rdm_scale.evaluation.measurements import Measurement, MeasureOptions, measure, metric_name, parse_metrics
from rdm_scale.evaluation.set_statistics import SetIdentity, SetStatistics

IDENTITY = SetIdentity("net", "f" * 64, "none", "uint8", 1, 8, 8)


def normal(samples: int, shift: float = 0.0) -> SetStatistics:
    gaussian = Gaussian(np.full(4, shift), np.eye(4))
    features = np.random.default_rng(samples).standard_normal((50, 4)).astype(np.float32) + np.float32(shift)
    return SetStatistics(f"{samples} samples", samples, IDENTITY, gaussian, None, features)


@pytest.mark.parametrize(
    ("metric", "network", "name"),
    [
        ("fid", "inception-2015-12-05", "FID"),
        ("sfid", "inception-2015-12-05", "sFID"),
        ("kid", "inception-2015-12-05", "KID"),
        ("fid", "inception-01234567", "FD(inception-01234567)"),
        ("fid", "efficientnet-lite0", "FD(efficientnet-lite0)"),
        ("kid", "efficientnet-lite0", "KD(efficientnet-lite0)"),
        ("fvd", "i3d-kinetics-400", "FVD(i3d-kinetics-400)"),
        ("fid", "i3d-kinetics-400", "FD(i3d-kinetics-400)"),
        ("recall", "digits", "recall(digits)"),
    ],
)
def test_only_the_published_network_has_the_published_names(metric: str, network: str, name: str) -> None:
    assert metric_name(metric, network) == name


def test_lines_hold_what_they_depend_on() -> None:
    real, generated = normal(100_000), normal(50_000, shift=1.0)
    context = {"sampler": "heun", "steps": 25, "seed": 0}
    fid, recall = measure(["fid", "recall"], real, generated, MeasureOptions(half_precision=True), context)
    assert fid.value == pytest.approx(4) and not fid.warnings
    assert fid.line().startswith("FD(net) 4.0000  [metric=fid; real=100000; generated=50000; network=net; ")
    assert "network_sha256=ffffffffffff;" in fid.line() and "sampler=heun; steps=25; seed=0" in fid.line()
    assert fid.record()["network_sha256"] == "f" * 64
    assert (recall.fields["real"], recall.fields["distances"]) == (50, "float16 (ADM)")


def test_a_distance_like_its_bias_is_warned_of() -> None:
    (found,) = measure(["fid"], normal(40), normal(60, shift=0.1))
    expected = (4 + 4 * 5 / 4) * (1 / 40 + 1 / 60)
    assert found.fields["expected_bias"] == pytest.approx(expected)
    (warning,) = found.warnings
    assert "40 samples of 40 samples and 60 samples of 60 samples are few for 4 features" in warning


def test_a_reference_without_features_has_no_recall() -> None:
    real = dataclasses.replace(normal(100), features=None)
    with pytest.raises(ConfigError, match="holds no features of single samples, which KID, precision and recall need"):
        measure(["recall"], real, normal(100))
    with pytest.raises(ConfigError, match="holds no spatial features, which sFID needs"):
        measure(["sfid"], real, normal(100))


def test_features_of_the_first_samples_are_warned_of() -> None:
    """References of earlier versions kept the first samples, which are of the first classes."""
    real = dataclasses.replace(normal(100), first_kept=True)
    for found in measure(["kid", "precision", "recall"], real, normal(100)):
        assert "the features of its first 50 of 100 samples" in found.warnings[0]
    for one in (normal(100), dataclasses.replace(normal(50), first_kept=True)):
        assert not any(found.warnings for found in measure(["kid", "recall"], one, normal(100)))


def test_small_and_large_values_keep_their_digits() -> None:
    shown = [Measurement("m", value).line().split()[1] for value in (133.90776, 0.000123456, -0.5, 0.0)]
    assert shown == ["133.91", "0.00012346", "-0.50000", "0.0000"]


def test_lists_of_measures() -> None:
    assert parse_metrics("fid, KID,fid") == ("fid", "kid")
    for text in ("fid,fdd", ""):
        with pytest.raises(ConfigError, match="choose some of fid, fvd, sfid"):
            parse_metrics(text)
