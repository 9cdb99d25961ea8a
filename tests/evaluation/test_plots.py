"""Plots: the loss as a file, errors for damaged metrics, and heat maps along depth."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rdm_scale.errors import DataError
from rdm_scale.evaluation import plot_loss
from rdm_scale.evaluation.plots import as_array, depth_figure, heat_map, is_logarithmic, loss_figure, plot_channels, png
from rdm_scale.storage.location import Location


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def metrics(path: Path, steps: int, validation: bool) -> Path:
    records = [{"step": s, "loss": 2 / s, "grad_norm": 1.0, "lr": 1e-3, "samples": 64 * s} for s in range(1, steps + 1)]
    for record in records[9::10] if validation else []:
        record["validation_loss"] = record["loss"] + 0.1
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def has_color(image: np.ndarray, rgb: tuple[int, int, int]) -> bool:
    return bool((np.abs(image - np.array(rgb)).max(axis=2) < 8).any())


@pytest.mark.parametrize(("steps", "validation"), [(1, False), (200, False), (200, True)])
def test_the_loss_plot_shows_training_and_validation_loss(tmp_path: Path, steps: int, validation: bool) -> None:
    plot_loss(metrics(tmp_path / "metrics.jsonl", steps, validation), tmp_path / "loss.png")
    image = Image.open(tmp_path / "loss.png")
    assert image.format == "PNG"
    assert image.size == (1200, 720)
    assert has_color(pixels(image.convert("RGB")), (31, 119, 180))  # blue
    assert has_color(pixels(image.convert("RGB")), (255, 127, 14)) == validation  # orange
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


@pytest.mark.parametrize(
    "content", ["", '{"step": 1, "lo', '{"step": 1}\n', "[1, 2]\n", '{"step": 1, "loss": "low"}\n']
)
def test_a_run_without_losses_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="holds no steps yet"):
        plot_loss(path, tmp_path / "loss.png")
    with pytest.raises(DataError, match="holds no steps yet"):
        plot_loss(tmp_path / "none.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_a_damaged_line_costs_that_line(tmp_path: Path) -> None:
    path, reported = tmp_path / "metrics.jsonl", list[str]()
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n{"st\xff\n\n{"step": 3, "loss": 1.5}\n{"step": 4, "lo')
    figure = loss_figure(path, reported.append)
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[1, 2.0], [3, 1.5]]
    assert len(reported) == 1 and "1 of 4 lines are left out" in reported[0] and reported[0].endswith(": line 2")


def test_channel_statistics_are_written_or_the_path_is_reported(tmp_path: Path) -> None:
    plot_channels([0.0, 1.0], [1.0, 2.0], Location(tmp_path / "channels.png"))
    assert Image.open(tmp_path / "channels.png").size == (480, 420)
    with pytest.raises(DataError, match=r"cannot write the plot .*none/channels.png"):
        plot_channels([0.0], [1.0], Location(tmp_path / "none/channels.png"))


def test_heat_maps_show_depth_downwards_and_steps_to_the_right() -> None:
    gains: list[list[float | None]] = [[0.1, None, 0.1 * step] for step in (1, 2, 3)]
    values = as_array(gains)
    assert values.shape == (3, 3) and np.isnan(values[1]).all()
    assert values[2].tolist() == pytest.approx([0.1, 0.2, 0.3])
    image = heat_map(gains)
    tall, wide = image.shape[0] // 3, image.shape[1] // 3
    assert not image[tall : 2 * tall].any(), "absent values are black"
    first, last = image[-1, 0].astype(int), image[-1, -1].astype(int)
    assert image[0, 0].tolist() == image[0, wide].tolist() == first.tolist()
    assert last.sum() > first.sum() + 100
    assert is_logarithmic(np.array([1.0, 20.0])) and not is_logarithmic(np.array([-1.0, 20.0]))


def test_depth_figures_show_each_step_and_a_few_profiles() -> None:
    figure = depth_figure("stream", list(range(1, 9)), np.linspace(1, 50, 24).reshape(3, 8))
    left, right = figure.axes[:2]
    assert left.images[0].get_array().shape == (3, 8)
    assert [line.get_label() for line in right.lines][:: len(right.lines) - 1] == ["step 1", "step 8"]
    assert right.get_yscale() == "log" and png(figure).startswith(b"\x89PNG")
