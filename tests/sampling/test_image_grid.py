"""Image grids and animations, pixel by pixel."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rdm_scale.errors import DataError
from rdm_scale.sampling.image_grid import animated_grid, image_grid, write_grid
from rdm_scale.storage.location import Location


def pixels(grid: Image.Image) -> np.ndarray:
    return np.asarray(grid).astype(int)


def test_cells_lie_in_rows_on_white_with_padding() -> None:
    images = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 3, 4, 6)
    grid = pixels(image_grid(images, columns=3, scale=2, padding=5))
    assert grid.shape == (2 * (8 + 5) + 5, 3 * (12 + 5) + 5, 3)
    expected = np.full(grid.shape, 255)
    for i, value in enumerate((0, 64, 128, 191, 255)):  # -1 is black, 0 is middle gray, 1 is white
        top, left = 5 + 13 * (i // 3), 5 + 17 * (i % 3)
        expected[top : top + 8, left : left + 12] = value
    assert np.array_equal(grid, expected)


def test_pixels_are_enlarged_without_smoothing_and_keep_their_colors() -> None:
    image = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    grid = pixels(image_grid(image, columns=1, scale=3, padding=0))
    expected = ((image[0] + 1) * 127.5).round().int().permute(1, 2, 0).numpy()
    for row in range(3):
        assert np.array_equal(grid[row::3, row::3], expected)


@pytest.mark.parametrize(("size", "cell"), [(8, 64), (32, 64), (48, 96), (64, 64), (100, 100)])
def test_cells_are_at_least_64_pixels(size: int, cell: int) -> None:
    assert image_grid(torch.zeros(2, 3, size, size), columns=2, padding=4).size == (2 * (cell + 4) + 4, cell + 8)


def test_one_channel_is_gray_and_values_beyond_the_range_are_clamped() -> None:
    gray = torch.tensor([-3.0, 0.25, 7.0]).view(3, 1, 1, 1)
    assert pixels(image_grid(gray, columns=3, scale=1, padding=0)).tolist() == [[[0] * 3, [159] * 3, [255] * 3]]


def test_labels_are_centered_above_their_columns() -> None:
    images, padding = torch.zeros(4, 3, 64, 64), 8
    plain = pixels(image_grid(images, 2))
    labelled = pixels(image_grid(images, 2, ["gjpq", "a name much too long for a column"]))
    header = labelled.shape[0] - plain.shape[0]
    assert header > 11
    assert np.array_equal(labelled[header:], plain)
    ink = (labelled[:header].min(axis=2) < 128).nonzero()
    columns = ink[1]
    assert not ((columns >= padding + 64) & (columns < 2 * padding + 64)).any()  # none runs into the next column
    for first in (padding, 2 * padding + 64):
        inside = columns[(columns >= first) & (columns < first + 64)]
        assert len(inside) > 30
        assert (inside.min() + inside.max()) / 2 == pytest.approx(first + 32, abs=4)
    assert ink[0].max() < header  # descenders are not clipped
    assert (labelled[header - 1 : header + padding] == 255).all()


def test_labels_are_as_large_as_their_columns_allow() -> None:
    def ink_height(name: str) -> int:
        image = pixels(image_grid(torch.ones(1, 3, 64, 64), 1, [name]))
        return len(np.unique((image.min(axis=2) < 128).nonzero()[0]))

    assert ink_height("H") > ink_height("HHHHHH") > ink_height("HHHHHHHHH") > 6


@pytest.mark.parametrize(
    ("images", "columns", "labels", "message"),
    [
        (torch.zeros(2, 4, 8, 8), 2, [], r"cannot show \[2, 4, 8, 8\]"),
        (torch.zeros(2, 8, 8), 2, [], r"cannot show \[2, 8, 8\]"),
        (torch.zeros(0, 3, 8, 8), 2, [], "cannot show"),
        (torch.full((2, 3, 8, 8), torch.nan), 2, [], "NaN"),
        (torch.zeros(2, 3, 8, 8), 2, ["one"], "1 column_labels do not fit 2 columns"),
        (torch.zeros(2, 3, 8, 8), 0, [], "do not fit 0 columns"),
    ],
)
def test_invalid_images_are_refused(images: torch.Tensor, columns: int, labels: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_grid(images, columns, labels)


def clips(count: int = 3, frames: int = 4) -> torch.Tensor:
    """Clips [N, 3, T, 8, 8] in which every frame of every clip has its own shade of gray."""
    values = torch.linspace(-1, 1, count * frames).view(count, 1, frames, 1, 1)
    return values.expand(count, 3, frames, 8, 8)


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_an_animation_plays_all_frames_of_all_clips(kind: str) -> None:
    videos = clips()
    content = animated_grid(videos, 3, ["a", "b", "c"], fps=5, kind=kind)  # type: ignore[arg-type]
    animation = Image.open(io.BytesIO(content))
    assert (animation.format, animation.n_frames, animation.info["loop"]) == (kind.upper(), 4, 0)  # type: ignore[attr-defined]
    for i in range(4):
        animation.seek(i)
        shown = pixels(animation.convert("RGB"))
        assert animation.info["duration"] == pytest.approx(200, abs=1)
        assert np.abs(shown - pixels(image_grid(videos[:, :, i], 3, ["a", "b", "c"]))).max() <= 8  # GIF: 256 colors


def test_identical_frames_keep_their_duration() -> None:
    animation = Image.open(io.BytesIO(animated_grid(torch.zeros(1, 3, 5, 8, 8), 1, fps=10)))
    durations = []
    for i in range(animation.n_frames):  # type: ignore[attr-defined]
        animation.seek(i)
        durations.append(animation.info["duration"])
    assert sum(durations) == 500


def test_invalid_clips_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot show \[3, 3, 8, 8\] as clips"):
        animated_grid(torch.zeros(3, 3, 8, 8), 3)
    for fps in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="frames a second"):
            animated_grid(clips(), 3, fps=fps)


def test_clips_are_written_as_a_still_and_an_animation(tmp_path: Path) -> None:
    videos, output = clips(), Location(tmp_path / "out.png")
    assert [str(file) for file in write_grid(videos, output, 3)] == [f"{tmp_path}/out.png", f"{tmp_path}/out.gif"]
    still = Image.open(tmp_path / "out.png")
    assert np.array_equal(pixels(still), pixels(image_grid(videos[:, :, 2], 3)))
    assert Image.open(tmp_path / "out.gif").n_frames == 4  # type: ignore[attr-defined]
    images = write_grid(videos[:, :, :1], Location(tmp_path / "images.png"), 3)
    assert [file.name for file in images] == ["images.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.png", "out.gif", "out.png"]
    with pytest.raises(DataError, match=r"cannot write the image grid .*none/out.png"):
        write_grid(videos, Location(tmp_path / "none/out.png"), 3)


@pytest.mark.parametrize("name", ["out.png", "out.gif"])
def test_only_own_pictures_are_replaced(tmp_path: Path, name: str) -> None:
    videos, output = clips(), Location(tmp_path / "out.png")
    write_grid(videos, output, 3)
    write_grid(videos, output, 3)
    Image.new("RGB", (4, 4)).save(tmp_path / name)  # someone's photograph
    before = (tmp_path / name).read_bytes()
    with pytest.raises(DataError, match=rf"{name} exists and was not written by rdm_scale: choose another name"):
        write_grid(videos, output, 3)
    assert (tmp_path / name).read_bytes() == before
