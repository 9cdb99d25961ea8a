"""Measurements: chosen measures of a generated set against a real one, with all that they depend on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rdm_scale.errors import ConfigError
from rdm_scale.evaluation.feature_moments import Gaussian
from rdm_scale.evaluation.measures import (
    KID_SUBSET_SIZE,
    KID_SUBSETS,
    NEIGHBOURS,
    expected_bias,
    frechet_distance,
    inception_score,
    kernel_distance,
    share_inside,
)
from rdm_scale.evaluation.networks.feature_network import FeatureNetwork
from rdm_scale.evaluation.set_statistics import SetIdentity, SetStatistics, Wanted

PUBLISHED = "inception-2015-12-05"  # the network of FID, if its weights have the known sha256
METRICS = ("fid", "fvd", "sfid", "is", "kid", "precision", "recall", "clip")
MAX_FEATURES = 10_000  # samples that precision, recall and KID use of each set, as ADM's evaluator
MATERIAL_BIAS = 0.1  # share of a distance from which its expected bias is reported as a warning
_PUBLISHED_NAMES = {"fid": "FID", "sfid": "sFID", "is": "IS", "kid": "KID"}
_OTHER_NAMES = {"fid": "FD", "fvd": "FVD", "sfid": "sFD", "is": "IS", "kid": "KD", "clip": "CLIP score"}
Rows = NDArray[np.float32]
_SHORT = 12  # characters of a digest in a printed line


@dataclass(frozen=True)
class MeasureOptions:
    """Definitions that differ between evaluators.

    Attributes:
        splits: parts of the inception score; ADM and most papers use 10.
        half_precision: distances of precision and recall in float16, as ADM's.
        seed: of the random subsets of KID and the shuffle before splits.
    """

    splits: int = 1
    half_precision: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Measurement:
    """Value of a measure with everything that it depends on.

    Attributes:
        name: of the measure and, unless published, its network: `FVD(i3d-kinetics-400)`.
        value: the number.
        fields: all else by name; lines that differ in one of them should not be compared.
        warnings: what a reader must know, if anything.
    """

    name: str
    value: float
    fields: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def line(self) -> str:
        """One line for people: name, value, and the fields in short."""
        shown = (f"{key}={_short(value)}" for key, value in self.fields.items() if value not in (None, ""))
        return f"{self.name} {self.value:.{_digits(self.value)}f}  [{'; '.join(shown)}]"

    def record(self) -> dict[str, Any]:
        """All fields for machines."""
        return {"value": self.value} | self.fields | {"warnings": list(self.warnings)}


def parse_metrics(text: str) -> tuple[str, ...]:
    """Names of measures from a comma-separated list. Raises ConfigError: unknown or none."""
    names = tuple(dict.fromkeys(name.strip().lower() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise ConfigError(f"--metrics {text}: choose some of {', '.join(METRICS)}")
    return names


def wanted_for(metrics: Sequence[str], network: FeatureNetwork | None, most: int = MAX_FEATURES) -> Wanted:
    """Statistics that these measures need.

    Args:
        network: None for features given as arrays.
        most: samples of a set whose features are kept.

    Raises:
        ConfigError: the network does not have what a measure needs.
    """
    name = "identity" if network is None else network.identity.name
    if "is" in metrics and (network is None or not network.classes):
        raise ConfigError(
            f"an inception score needs class probabilities, which the features {name} do not have: use --features "
            "inception=FILE, efficientnet-lite0 or digits, or leave is out of --metrics"
        )
    if "sfid" in metrics and (network is None or not network.spatial_width):
        raise ConfigError(
            f"sFID needs the spatial features of Inception, which {name} does not have: use --features inception=FILE, "
            "or leave sfid out of --metrics"
        )
    if "clip" in metrics and not name.startswith("clip-"):
        raise ConfigError(f"a CLIP score needs --features clip=FOLDER, not {name}")
    if "fvd" in metrics and network is not None and not network.takes_clips:
        raise ConfigError(f"FVD needs a network of clips, and {name} is one of images: use --features i3d")
    kept = most if {"kid", "precision", "recall"} & set(metrics) else 0
    return Wanted(kept, "sfid" in metrics, "is" in metrics, "clip" in metrics)


def measure(
    metrics: Sequence[str],
    real: SetStatistics,
    generated: SetStatistics,
    options: MeasureOptions | None = None,
    context: Mapping[str, Any] | None = None,
) -> list[Measurement]:
    """Compute measures of a generated set against a real one.

    Args:
        context: further fields of the lines: model, step, weights, sampler, steps, guidance, seed.

    Raises:
        ConfigError: the sets cannot be compared, or lack what a measure needs.
        DataError: too few samples for a measure.
    """
    options = options or MeasureOptions()
    assert generated.identity is not None
    check_comparable(real, generated.identity, generated.name)
    fields = {"real": real.samples or "unknown", "generated": generated.samples} | asdict(generated.identity)
    fields |= {"stride": generated.stride, "real_stride": real.stride, "real_data": real.data} | dict(context or {})
    found = []
    for metric in metrics:
        value, extra, warnings = _VALUES[metric](real, generated, options)
        name = metric_name(metric, generated.identity.network)
        found.append(Measurement(name, value, {"metric": metric} | fields | extra, warnings))
    return found


def metric_name(metric: str, network: str) -> str:
    """Name that says what was measured: `FID` for the published network only, `FD(network)` for others."""
    if network == PUBLISHED and metric != "fvd":
        return _PUBLISHED_NAMES.get(metric, metric)
    return f"{_OTHER_NAMES.get(metric, metric)}({network})"


def check_comparable(real: SetStatistics, identity: SetIdentity, name: str) -> None:
    """Raise ConfigError unless the real features are of the network and preprocessing of the set `name`."""
    if real.identity is not None:
        real.identity.check_comparable(identity, real.name, name)
    elif not identity.network.startswith("inception"):
        raise ConfigError(
            f"{real.name} does not say its network, as files of ADM, whose network is Inception; {name} is measured "
            f"with {identity.network}: use --features inception=FILE"
        )


class _Value(NamedTuple):
    """Value of a measure, its own fields, and warnings."""

    value: float
    fields: dict[str, Any]
    warnings: tuple[str, ...] = ()


def _distance(real: Gaussian, generated: Gaussian, sets: tuple[SetStatistics, SetStatistics]) -> _Value:
    value = frechet_distance(real, generated)
    counts = [one.samples for one in sets if one.samples]
    bias = expected_bias(real.covariance, *counts)
    warnings = []
    few = [one for one in sets if 0 < one.samples <= real.width]
    if few or (bias > MATERIAL_BIAS * value and bias > 0):
        warnings.append(
            f"{' and '.join(f'{one.samples} samples of {one.name}' for one in few or sets)} are few for {real.width} "
            f"features: sets of one distribution would differ by about {bias:.3g} too (expected bias)"
        )
    for gaussian, one in zip((real, generated), sets, strict=True):
        if one.samples != 1 and not gaussian.covariance.any():
            warnings.append(
                f"all samples of {one.name} have the same features: constant images or clips; expected bias {bias:.3g}"
            )
    return _Value(value, {"expected_bias": bias}, tuple(warnings))


def _frechet(real: SetStatistics, generated: SetStatistics, options: MeasureOptions) -> _Value:
    return _distance(real.pooled, generated.pooled, (real, generated))


def _spatial_frechet(real: SetStatistics, generated: SetStatistics, options: MeasureOptions) -> _Value:
    if real.spatial is None or generated.spatial is None:
        raise ConfigError(
            f"{real.name} holds no spatial features, which sFID needs: write the reference with Inception"
        )
    return _distance(real.spatial, generated.spatial, (real, generated))


def _score(real: SetStatistics, generated: SetStatistics, options: MeasureOptions) -> _Value:
    assert generated.probabilities is not None
    score = inception_score(generated.probabilities, options.splits, options.seed)
    return _Value(score.mean, {"std": score.std, "splits": options.splits})


def _kernel(real: SetStatistics, generated: SetStatistics, options: MeasureOptions) -> _Value:
    x, y = _features(real, generated)
    found = kernel_distance(x, y, seed=options.seed)
    size = min(KID_SUBSET_SIZE, len(x), len(y))
    own = {"real": len(x), "generated": len(y), "std": found.std, "subsets": KID_SUBSETS, "subset_size": size}
    return _Value(found.mean, own, _warn_of_first(real))


def _precision(real: SetStatistics, generated: SetStatistics, options: MeasureOptions) -> _Value:
    x, y = _features(real, generated)
    share = share_inside(y, x, half_precision=options.half_precision)
    return _Value(share, _neighbour_fields(x, y, options), _warn_of_first(real))


def _recall(real: SetStatistics, generated: SetStatistics, options: MeasureOptions) -> _Value:
    x, y = _features(real, generated)
    share = share_inside(x, y, half_precision=options.half_precision)
    return _Value(share, _neighbour_fields(x, y, options), _warn_of_first(real))


def _caption_score(real: SetStatistics, generated: SetStatistics, options: MeasureOptions) -> _Value:
    assert generated.caption_score is not None
    return _Value(generated.caption_score, {"real": ""})


def _neighbour_fields(x: Rows, y: Rows, options: MeasureOptions) -> dict[str, Any]:
    distances = "float16 (ADM)" if options.half_precision else "float64"
    return {"real": len(x), "generated": len(y), "neighbours": NEIGHBOURS, "distances": distances}


def _warn_of_first(real: SetStatistics) -> tuple[str, ...]:
    if real.features is None or not real.first_kept or len(real.features) == real.samples:
        return ()
    return (
        f"{real.name} was measured by an earlier version, which kept the features of its first {len(real.features)} of "
        f"{real.samples} samples: of a folder these are the first classes only, and the value is wrong; write the "
        "reference again",
    )


def _features(real: SetStatistics, generated: SetStatistics) -> tuple[Rows, Rows]:
    """Features of single samples of both sets."""
    found = []
    for one in (real, generated):
        if one.features is None:
            raise ConfigError(
                f"{one.name} holds no features of single samples, which KID, precision and recall need: write the "
                "reference again"
            )
        found.append(one.features)
    return found[0], found[1]


_VALUES = {
    "fid": _frechet,
    "fvd": _frechet,
    "sfid": _spatial_frechet,
    "is": _score,
    "kid": _kernel,
    "precision": _precision,
    "recall": _recall,
    "clip": _caption_score,
}


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text[:_SHORT] if len(text) == 64 else text  # a sha256


def _digits(value: float) -> int:
    """Decimals that show at least five significant digits."""
    return 2 if abs(value) >= 100 else min(12, max(4, 4 - math.floor(math.log10(abs(value))))) if value else 4
