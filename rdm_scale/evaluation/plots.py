"""Plots of a run: its loss, latent statistics, and heat maps along depth."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_channels(mean: Sequence[float], std: Sequence[float], output: Location) -> None:
    """Draws mean and standard deviation of each latent channel. Raises DataError: the file cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(max(4.0, 0.5 * len(mean)), 3.5), layout="constrained")
    axes.errorbar(range(len(mean)), mean, yerr=std, fmt="o", capsize=4)
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.set(xlabel="latent channel", ylabel="mean, and one standard deviation", title="raw latents")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    plt.close(figure)
    try:
        output.write(picture.getvalue())
    except OSError as error:
        raise DataError(f"cannot write the plot {output}: {error}; choose another place") from None


def plot_loss(metrics_file: Path, output: Path) -> None:
    """Draws `loss_figure` into a PNG file of 1200 x 720 pixels, written whole or not at all."""
    png = io.BytesIO()
    loss_figure(metrics_file).savefig(png, format="png")
    Location(output).write(png.getvalue())


def loss_figure(metrics_file: Path) -> "Figure":
    """Training and validation loss over the steps of a run.

    Args:
        metrics_file: metrics.jsonl of a run, one object a line: step, loss and sometimes validation_loss.

    Raises:
        DataError: the metrics are missing, empty, or a line does not hold step and loss as numbers.
    """
    from matplotlib.figure import Figure

    records = _read_metrics(metrics_file)
    steps = np.array([record["step"] for record in records])
    loss = np.array([record["loss"] for record in records])
    window = max(1, len(loss) // 50)
    validation = [(record["step"], record["validation_loss"]) for record in records if "validation_loss" in record]

    figure = Figure(figsize=(10, 6), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss", title="Training and validation loss")
    axes.plot(steps, loss, color="tab:blue", alpha=0.25, linewidth=1, label="training, each step")
    steps_mean, loss_mean = (np.convolve(values, np.ones(window) / window, mode="valid") for values in (steps, loss))
    axes.plot(steps_mean, loss_mean, color="tab:blue", linewidth=2, label=f"training, mean of {window} steps")
    if validation:
        axes.plot(*zip(*validation, strict=True), color="tab:orange", marker="o", linewidth=2, label="validation")
    if loss.min() > 0 and loss_mean.max() > 5 * loss_mean.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def _read_metrics(path: Path) -> list[dict[str, float]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the metrics {path}: {getattr(error, 'strerror', None) or error}") from None
    records: list[dict[str, float]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            keys = ["step", "loss", *(["validation_loss"] if "validation_loss" in record else [])]
            records.append({key: float(record[key]) for key in keys})
        except (ValueError, TypeError, KeyError):
            raise DataError(f"{path}, line {number}: not an object with the numbers step and loss") from None
    if not records:
        raise DataError(f"{path} holds no steps yet: nothing to plot")
    return records


_COLUMNS = 512  # most steps that a heat map shows


def heat_map(columns: list[list[float | None]]) -> NDArray[np.uint8]:
    """Picture [height, width, 3]: depth downwards, steps to the right, dark to bright; black where there is nothing."""
    import matplotlib

    values = as_array(columns)
    values = values[:, :: -(-values.shape[1] // _COLUMNS)]
    values = np.log(values) if is_logarithmic(values) else values
    there = values[np.isfinite(values)]
    low, high = (there.min(), there.max()) if there.size else (0.0, 0.0)
    scaled = (values - low) / (high - low) if high > low else np.where(np.isfinite(values), 0.5, np.nan)
    picture = (matplotlib.colormaps["viridis"](np.nan_to_num(scaled))[..., :3] * 255).astype(np.uint8)
    picture[~np.isfinite(values)] = 0
    return np.kron(picture, np.ones((max(1, 256 // len(values)), 4, 1), np.uint8))


def as_array(columns: list[list[float | None]]) -> NDArray[np.float64]:
    """[depth, steps]; absent numbers are nan."""
    return np.array([[np.nan if v is None else v for v in column] for column in columns]).T


def is_logarithmic(values: NDArray[np.float64]) -> bool:
    """Whether the values are better seen on a logarithmic scale: positive, and over more than a factor of 10."""
    there = values[np.isfinite(values)]
    return bool(there.size and there.min() > 0 and there.max() > 10 * there.min())
