"""Law files: the JSON of a fitted law, its intervals and what it was fitted to."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from typing import Any

import numpy as np

from rdm_scale.errors import DataError
from rdm_scale.scaling.allocation import TrainingFlops, optimal_allocation
from rdm_scale.scaling.intervals import Interval, bootstrap_laws, intervals_of
from rdm_scale.scaling.law import Fit, Law, fit_law
from rdm_scale.scaling.observations import Observations
from rdm_scale.storage.json_files import read_bounded
from rdm_scale.storage.location import Location

PARAMETERS = ("E", "A", "B", "alpha", "beta")
FORMAT = "rdm_scale scaling law 1"


@dataclass(frozen=True)
class FittedLaw:
    """A law with its uncertainty and its data.

    Attributes:
        size: meaning of N: `parameters`, or `depth` for a law over depth at fixed width.
        replicates: laws fitted to resampled runs.
        left_out: in words, what was not fitted and why.
        warnings: reasons to doubt the fit.
    """

    fit: Fit
    observations: Observations
    replicates: list[Law]
    flops: TrainingFlops
    size: str = "parameters"
    left_out: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def law(self) -> Law:
        return self.fit.law

    def intervals(self) -> dict[str, Interval]:
        """90 % intervals of the law's numbers."""
        return intervals_of(self.replicates, {name: attrgetter(name) for name in PARAMETERS})

    def as_json(self) -> dict[str, Any]:
        """Content of a law file."""
        found, observations = self.observations, self.observations
        predicted = self.law.loss(found.parameters, found.samples)
        runs = {
            name: values.tolist()
            for name in ("parameters", "samples", "loss", "flops", "seed", "depth")
            if (values := getattr(observations, name)) is not None
        }
        return {
            "format": FORMAT,
            **asdict(self.law),
            "intervals": {name: [each.low, each.high] for name, each in self.intervals().items()},
            "interval_level": 0.9,
            "objective": self.fit.objective,
            "objective_is": "sum over the runs of the Huber loss (delta 0.001) of ln(predicted) - ln(loss)",
            "searches": {"agreeing": self.fit.agreeing, "all": self.fit.searches},
            "size": self.size,
            "left_out": self.left_out,
            "warnings": self.warnings,
            "flops_of_a_sample": asdict(self.flops),
            "optimal": [asdict(optimal_allocation(self.law, budget, self.flops)) for budget in self.budgets()],
            "runs": runs,
            "residuals": (np.log(found.loss) - np.log(predicted)).tolist(),
            "replicates": [[getattr(law, name) for name in PARAMETERS] for law in self.replicates],
        }

    def budgets(self) -> list[float]:
        """FLOPs of the runs, a decade apart, and two decades beyond the largest."""
        used = run_flops(self.observations, self.flops)
        first, last = np.floor(np.log10(used.min())), np.ceil(np.log10(used.max())) + 2
        return [float(10**power) for power in np.arange(first, last + 1)]


def fit_with_intervals(
    observations: Observations,
    *,
    size: str = "parameters",
    replicates: int,
    workers: int = 1,
    left_out: list[str] | None = None,
    warnings: list[str] | None = None,
) -> FittedLaw:
    """Fit a law and its bootstrap replicates, and collect the reasons to doubt it.

    Raises:
        DataError: there are too few runs.
    """
    if size == "depth":
        observations = observations.by_depth()
    fit = fit_law(observations)
    laws = bootstrap_laws(observations, fit.law, replicates, workers=workers)
    doubts = [*(warnings or []), *fit_warnings(fit)]
    return FittedLaw(fit, observations, laws, TrainingFlops.of(observations), size, left_out or [], doubts)


def fit_warnings(fit: Fit) -> list[str]:
    """Reasons to doubt a fit that the fit itself shows."""
    found = []
    if fit.floor_at_bound:
        found.append(
            f"E = {fit.law.E:.4g} lies at its bound: the runs do not determine the loss that no size and no data can "
            "go below; predictions far beyond the runs mean nothing. Add larger and longer runs"
        )
    if fit.agreeing < 2:
        found.append(
            f"only one of {fit.searches} searches ended at the best objective: the fit may not be the best one"
        )
    return found


def run_flops(observations: Observations, flops: TrainingFlops) -> np.ndarray:
    """Training FLOPs of each run: as given, else by the rule for its size."""
    if observations.flops is not None:
        return observations.flops
    return flops(observations.parameters) * observations.samples


def write_law(file: Location, law: FittedLaw) -> None:
    file.write((json.dumps(law.as_json(), indent=1) + "\n").encode())


def read_law(file: Location) -> tuple[FittedLaw, str]:
    """Read a law file; returns the law and the SHA-256 of the file.

    Raises:
        DataError: the file is missing, damaged, or no law.
    """
    try:
        content = read_bounded(file, DataError)
        tree = json.loads(content)
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            raise DataError(f"{file} is no law: give the file that `scaling.py fit ... -o law.json` wrote")
        return _parsed(tree), hashlib.sha256(content).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read the law {file}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"the law {file} is damaged ({error}): fit it again") from None


def _parsed(tree: Mapping[str, Any]) -> FittedLaw:
    law = Law(*(float(tree[name]) for name in PARAMETERS))
    runs = {name: np.array(values, np.float64) for name, values in tree["runs"].items()}
    searches = tree["searches"]
    fit = Fit(law, float(tree["objective"]), int(searches["agreeing"]), int(searches["all"]), False)
    flops = TrainingFlops(*(tuple(map(float, tree["flops_of_a_sample"][key])) for key in ("log_sizes", "log_flops")))
    laws = [Law(*map(float, row)) for row in tree["replicates"]]
    return FittedLaw(
        fit, Observations(**runs), laws, flops, str(tree["size"]), list(tree["left_out"]), list(tree["warnings"])
    )
