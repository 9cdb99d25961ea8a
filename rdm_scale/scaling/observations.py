"""Finished training runs as a scaling law sees them: size, samples and loss."""

import csv
import io
import math
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from rdm_scale.errors import DataError
from rdm_scale.storage.json_files import read_bounded
from rdm_scale.storage.location import Location

Array = NDArray[np.float64]
REQUIRED, OPTIONAL = ("parameters", "samples", "loss"), ("flops", "seed", "depth")


@dataclass(frozen=True)
class Observations:
    """Runs, one an entry of each array.

    Attributes:
        parameters: N, all trained parameters.
        samples: D, samples seen in training, in any unit.
        loss: validation loss at the end.
        flops: floating-point operations of the whole run.
        seed: seed of the run.
        depth: number of blocks.
    """

    parameters: Array
    samples: Array
    loss: Array
    flops: Array | None = None
    seed: Array | None = None
    depth: Array | None = None

    def __len__(self) -> int:
        return len(self.loss)

    def select(self, rows: NDArray[np.intp] | NDArray[np.bool_]) -> "Observations":
        """Some of the runs, by index or mask."""
        chosen: dict[str, Array] = {
            field.name: values[rows] for field in fields(self) if (values := getattr(self, field.name)) is not None
        }
        return Observations(**chosen)

    def without_highest(self, count: int) -> "Observations":
        """All runs but those of the `count` highest losses."""
        return self.select(np.sort(np.argsort(self.loss, kind="stable")[: len(self) - count]))

    def by_depth(self) -> "Observations":
        """The same runs with the number of blocks as their size, for a law over depth at fixed width.

        Raises:
            DataError: the depths are not known.
        """
        if self.depth is None:
            raise DataError("a law over depth needs the depth of every run: add a column `depth` to the table")
        return Observations(self.depth, self.samples, self.loss, self.flops, self.seed, self.depth)


def read_observations(file: Location) -> Observations:
    """Read a table of runs: CSV with the columns parameters, samples, loss and, optionally, flops, seed, depth.

    Other columns are ignored.

    Raises:
        DataError: the file cannot be read, a column is missing, or a value is not a positive number.
    """
    try:
        text = read_bounded(file, DataError).decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise DataError(f"{file} is not UTF-8 text: give a CSV table with the columns {', '.join(REQUIRED)}") from None
    rows = list(csv.DictReader(io.StringIO(text)))
    columns = {name.strip(): name for name in (rows[0] if rows else {}) if name is not None}
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        raise DataError(
            f"{file} has no column {', '.join(missing)}: give a CSV table whose first line names the columns "
            f"{', '.join(REQUIRED)} (and optionally {', '.join(OPTIONAL)})"
        )
    known = [name for name in (*REQUIRED, *OPTIONAL) if name in columns]
    values = {
        name: np.array([_number(file, line, name, row[columns[name]]) for line, row in enumerate(rows, start=2)])
        for name in known
    }
    return Observations(**values)


def _number(file: Location, line: int, column: str, text: str | None) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (value <= 0 and column != "seed"):
        raise DataError(f"{file}, line {line}: {column} is {text!r}, but has to be a positive number")
    return value
