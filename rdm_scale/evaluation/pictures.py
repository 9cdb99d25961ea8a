"""Pictures for people: grids of images, and the course of a run's loss."""

import io
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rdm_scale.data.storage import Location
from rdm_scale.errors import DataError

CELL = 64  # pixels a side below which a cell is enlarged
SMALLEST_FONT, LARGEST_FONT = 11, 28  # pixels: still legible, and no banner over large images


def image_grid(
    images: Tensor,
    columns: int,
    column_labels: Sequence[str] = (),
    scale: int | None = None,
    padding: int = 8,
) -> Image.Image:
    """Lays images out in rows from left to right, on white, with space between them.

    Args:
        images: [N, 3, H, W] in [-1, 1] (what lies beyond is cut off); one channel is shown as grey.
        columns: images in a row; the last row may be shorter.
        column_labels: a text above each column; none: no header.
        scale: each pixel becomes scale x scale; None: the smallest that makes cells at least 64 pixels a side.
        padding: white pixels around every cell.

    Raises:
        ValueError: no images, another number of channels than 1 or 3, values that are not finite, or labels that do
            not match the columns.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise ValueError(f"cannot show {list(images.shape)} as pictures: expected [N, 3, H, W] or [N, 1, H, W]")
    if columns < 1 or len(column_labels) not in (0, columns):
        raise ValueError(f"{len(column_labels)} column_labels do not fit {columns} columns: give one for each, or none")
    if not images.isfinite().all():
        raise ValueError("cannot show images that hold NaN or infinity")
    # Whole pixels, not smoothed: what is seen is what the model made.
    scale = scale or math.ceil(CELL / min(images.shape[2:]))
    cells = _pixels(images).repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = cells.shape[1] + padding, cells.shape[2] + padding

    header = _header(column_labels, width, padding) if column_labels else Image.new("RGB", (0, 0))
    grid_size = (columns * width + padding, header.height + math.ceil(len(cells) / columns) * height + padding)
    grid = Image.new("RGB", grid_size, "white")
    grid.paste(header, (0, 0))
    for i, cell in enumerate(cells):
        row, column = divmod(i, columns)
        grid.paste(Image.fromarray(cell), (padding + column * width, header.height + padding + row * height))
    return grid


def _pixels(images: Tensor) -> np.ndarray:
    """[N, 1 or 3, H, W] in [-1, 1] to uint8 [N, H, W, 3]."""
    rgb = images.float().expand(-1, 3, -1, -1).clamp(-1, 1)
    return ((rgb + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _header(labels: Sequence[str], width: int, padding: int) -> Image.Image:
    """One line of text, each label centred over its column and cut short where it would run into the next."""
    cell = width - padding
    size = LARGEST_FONT
    while size > SMALLEST_FONT and any(_text_width(label, size) > cell for label in labels):
        size -= 1
    header = Image.new("RGB", (len(labels) * width + padding, padding + math.ceil(1.3 * size)), "white")
    draw = ImageDraw.Draw(header)
    for column, label in enumerate(labels):
        text = label
        while len(text) > 1 and _text_width(text, size) > cell:
            text = text[:-2] + "…"
        middle = padding + column * width + cell / 2
        draw.text((middle, padding), text, fill="black", font=_font(size), anchor="ma")
    return header


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _text_width(text: str, size: int) -> float:
    return _font(size).getlength(text)


def plot_loss(metrics_file: Path, output: Path) -> None:
    """Draws training and validation loss over the steps of a run into a PNG file of 1200 x 720 pixels.

    Args:
        metrics_file: metrics.jsonl of a run, one object a line: step, loss and sometimes validation_loss.
        output: the picture, written whole or not at all.

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
    png = io.BytesIO()
    figure.savefig(png, format="png")
    Location(output).write(png.getvalue())


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
