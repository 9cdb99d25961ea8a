"""Statistics of a real set in a file that ADM's evaluator reads too.

A `.npz` archive with `mu`, `sigma` and, with Inception, `mu_s` and `sigma_s` (float64), as ADM publishes them for
ImageNet and LSUN; `arr_0` may hold images. Beside these, `features` (for precision, recall and KID) and `identity`
(JSON: network, preprocessing, data), which files of ADM do not have.
"""

import io
import json
import zipfile
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdm_scale.errors import DataError
from rdm_scale.evaluation.feature_moments import Gaussian
from rdm_scale.evaluation.set_statistics import SetIdentity, SetStatistics
from rdm_scale.storage.location import Location

FORMAT = 1
MEAN, COVARIANCE, SPATIAL = "mu", "sigma", "_s"
IMAGES = "arr_0"


def is_reference(url: str) -> bool:
    """True for a `.npz` archive that holds a mean and a covariance.

    Raises:
        DataError: the archive cannot be read.
    """
    if not url.endswith(".npz"):
        return False
    with _Archive(url) as names:
        return {MEAN, COVARIANCE} <= set(names.files)


def read_reference(url: str) -> SetStatistics:
    """Read the statistics of a set, written by `write_reference` or published by ADM.

    Raises:
        DataError: the file cannot be read, is not a reference, or was written by a newer version.
    """
    with _Archive(url) as arrays:
        names = set(arrays.files)
        if not {MEAN, COVARIANCE} <= names:
            raise DataError(f"{url} holds {', '.join(sorted(names))}, and no {MEAN} and {COVARIANCE}: not a reference")
        pooled = _gaussian(arrays, "", url)
        spatial = _gaussian(arrays, SPATIAL, url) if MEAN + SPATIAL in names else None
        features = np.asarray(arrays["features"], np.float32) if "features" in names else None
        if "identity" not in names:
            return SetStatistics(url, 0, None, pooled, spatial, features)
        try:
            known = json.loads(str(arrays["identity"]))
            if known["format"] > FORMAT:
                raise DataError(f"{url} was written by a newer version of rdm_scale: update this one")
            identity = SetIdentity(**known["identity"])
            rest: dict[str, Any] = {key: known[key] for key in ("stride", "data", "option")}
            rest["first_kept"] = known.get("first_kept", True)
            return SetStatistics(known["name"], known["samples"], identity, pooled, spatial, features, **rest)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the identity in {url} is damaged: {error!r}; write the reference again") from None


def write_reference(output: Location, statistics: SetStatistics, images: NDArray[np.uint8] | None = None) -> None:
    """Write the statistics of a set.

    Args:
        images: uint8 [n, H, W, 3], from which ADM's evaluator computes its precision and recall.

    Raises:
        DataError: the file cannot be written.
    """
    arrays: dict[str, Any] = {MEAN: statistics.pooled.mean, COVARIANCE: statistics.pooled.covariance}
    if statistics.spatial is not None:
        arrays |= {MEAN + SPATIAL: statistics.spatial.mean, COVARIANCE + SPATIAL: statistics.spatial.covariance}
    if statistics.features is not None:
        arrays["features"] = statistics.features
    if images is not None:
        arrays[IMAGES] = images
    if statistics.identity is not None:
        known = {key: getattr(statistics, key) for key in ("name", "samples", "stride", "data", "option", "first_kept")}
        arrays["identity"] = np.array(json.dumps({"format": FORMAT, "identity": asdict(statistics.identity)} | known))
    write_arrays(output, **arrays)


def write_arrays(output: Location, **arrays: NDArray[Any]) -> None:
    """Write a `.npz` archive, atomically.

    Raises:
        DataError: it cannot be written, for instance because the disk is full.
    """
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    try:
        output.write(content.getvalue())
    except OSError as error:
        raise DataError(
            f"cannot write {output}: {error.strerror or error}; make room or choose another place"
        ) from None


class _Archive:
    """A `.npz` archive open for reading; every failure is a DataError."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self) -> Any:
        try:
            self._file = Location(self.url).open()
            self._arrays = np.load(self._file, allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"cannot read {self.url}: {error}") from None
        return self._arrays

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        self._file.close()
        if isinstance(error, zipfile.BadZipFile | EOFError | ValueError | OSError):
            raise DataError(f"{self.url} is damaged: {error}") from None


def _gaussian(arrays: Any, suffix: str, url: str) -> Gaussian:
    mean, covariance = (np.asarray(arrays[name + suffix], np.float64) for name in (MEAN, COVARIANCE))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise DataError(
            f"{url}: a mean of shape {list(mean.shape)} and a covariance of {list(covariance.shape)} do not fit"
        )
    return Gaussian(mean, covariance)
