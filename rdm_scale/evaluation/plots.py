"""Plots of a run: losses, latent statistics and profiles along depth.

`*_figure` functions make matplotlib figures, `plot_*` functions write them to PNG files. matplotlib is imported by the
functions: importing this module stays cheap.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rdm_scale.errors import DataError
from rdm_scale.storage.json_lines import Report, is_number, read_json_lines, warn
from rdm_scale.storage.location import Location

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_COLUMNS = 512  # steps that a heat map shows
PROFILES = 6  # steps whose profiles a depth figure shows as lines


def png(figure: "Figure") -> bytes:
    """Encode a figure as a PNG image."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def plot_loss(metrics_file: Path, output: Path) -> None:
    """Write `loss_figure` to a PNG file of 1200 x 720 pixels, atomically."""
    Location(output).write(png(loss_figure(metrics_file)))


def plot_channels(mean: Sequence[float], std: Sequence[float], output: Location) -> None:
    """Write `channel_figure` to a PNG file.

    Raises:
        DataError: the file cannot be written.
    """
    content = png(channel_figure(mean, std))
    try:
        output.write(content)
    except OSError as error:
        raise DataError(f"cannot write the plot {output}: {error}; choose another place") from None


def loss_figure(metrics_file: Path, report: Report = warn) -> "Figure":
    """Plot training and validation loss over the steps of a run.

    Args:
        metrics_file: metrics.jsonl of a run, one object a line: step, loss and sometimes validation_loss.
        report: is given a line about lines that do not hold them, which are left out.

    Raises:
        DataError: there are no metrics.
    """
    from matplotlib.figure import Figure

    records = _read_metrics(metrics_file, report)
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


def channel_figure(mean: Sequence[float], std: Sequence[float]) -> "Figure":
    """Plot mean and standard deviation of each latent channel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4.0, 0.5 * len(mean)), 3.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="latent channel", ylabel="mean, and one standard deviation", title="raw latents")
    axes.errorbar(range(len(mean)), mean, yerr=std, fmt="o", capsize=4)
    axes.axhline(0, color="grey", linewidth=0.5)
    return figure


def depth_figure(name: str, steps: Sequence[int], values: NDArray[np.float64]) -> "Figure":
    """Plot a quantity along depth, values [depth, steps]: a heat map and the profiles of a few steps."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    logarithmic = is_logarithmic(values)
    figure = Figure(figsize=(12, 4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    columns = np.arange(len(steps))
    image = left.imshow(values, aspect="auto", interpolation="nearest", norm=LogNorm() if logarithmic else None)
    ticks = columns[:: max(1, len(steps) // 6)]
    left.set(xlabel="step", ylabel="block", title=name)
    left.set_xticks(ticks, [f"{steps[i]:,}" for i in ticks])
    figure.colorbar(image, ax=left)
    for column in np.unique(np.linspace(0, len(steps) - 1, PROFILES).astype(int)):
        right.plot(values[:, column], marker="." if len(values) < 60 else "", label=f"step {steps[column]:,}")
    right.set(xlabel="block", title=name)
    if logarithmic:
        right.set_yscale("log")
    right.grid(alpha=0.3, which="both")
    right.legend(fontsize="small")
    return figure


def heat_map(columns: list[list[float | None]]) -> NDArray[np.uint8]:
    """Heat map of a quantity along depth, as an image [height, width, 3].

    Depth goes downwards and steps to the right; bright is large, and absent values are black. `columns` holds the
    profile of each step.
    """
    import matplotlib

    values = as_array(columns)
    values = values[:, :: -(-values.shape[1] // MAX_COLUMNS)]
    values = np.log(values) if is_logarithmic(values) else values
    present = values[np.isfinite(values)]
    low, high = (present.min(), present.max()) if present.size else (0.0, 0.0)
    scaled = (values - low) / (high - low) if high > low else np.where(np.isfinite(values), 0.5, np.nan)
    image = (matplotlib.colormaps["viridis"](np.nan_to_num(scaled))[..., :3] * 255).astype(np.uint8)
    image[~np.isfinite(values)] = 0
    return np.kron(image, np.ones((max(1, 256 // len(values)), 4, 1), np.uint8))


def as_array(columns: list[list[float | None]]) -> NDArray[np.float64]:
    """Array [depth, steps] of the profiles of successive steps; absent values are NaN."""
    return np.array([[np.nan if v is None else v for v in column] for column in columns]).T


def is_logarithmic(values: NDArray[np.float64]) -> bool:
    """True for values that suit a logarithmic scale: positive, and over more than a factor of 10."""
    present = values[np.isfinite(values)]
    return bool(present.size and present.min() > 0 and present.max() > 10 * present.min())


def _read_metrics(path: Path, report: Report) -> list[dict[str, float]]:
    """Step, loss and, where present, validation loss of each line of a metrics.jsonl."""
    try:
        lines = read_json_lines(path, _has_losses, report, "not an object with the numbers step and loss")
    except OSError as error:
        raise DataError(f"cannot read the metrics {path}: {error.strerror or error}") from None
    if not lines:
        raise DataError(f"{path} holds no steps yet: nothing to plot")
    names = ("step", "loss", "validation_loss")
    return [{name: float(line.record[name]) for name in names if name in line.record} for line in lines]


def _has_losses(record: dict[str, Any]) -> bool:
    return {"step", "loss"} <= record.keys() and all(
        is_number(record[name]) for name in ("step", "loss", "validation_loss") if name in record
    )
