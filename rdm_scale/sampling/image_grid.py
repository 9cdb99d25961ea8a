"""Image grids: images or clips in rows and columns, as an image or an animation.

Pixels are in [-1, 1]. Shapes: N images, T frames, H height, W width.
"""

import io
import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location
from rdm_scale.storage.own_files import MARK, refuse_to_replace

CELL = 64  # smaller cells are enlarged to at least this many pixels a side
SMALLEST_FONT, LARGEST_FONT = 11, 28  # pixels; legible, and not too large over large images


def image_grid(
    images: Tensor,
    columns: int,
    column_labels: Sequence[str] = (),
    scale: int | None = None,
    padding: int = 8,
) -> Image.Image:
    """Lay images out in rows from left to right, on white, with space between them.

    Args:
        images: [N, 3, H, W] in [-1, 1] (values outside are clamped); one channel is shown as gray.
        columns: images in a row; the last row may be shorter.
        column_labels: text above each column; empty: no header.
        scale: each pixel becomes scale x scale; None: the smallest that makes cells at least 64 pixels a side.
        padding: white pixels around every cell.

    Raises:
        ValueError: no images, another number of channels than 1 or 3, values that are not finite, or labels that do
            not match the columns.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise ValueError(f"cannot show {list(images.shape)} as images: expected [N, 3, H, W] or [N, 1, H, W]")
    if columns < 1 or len(column_labels) not in (0, columns):
        raise ValueError(f"{len(column_labels)} column_labels do not fit {columns} columns: give one for each, or none")
    if not images.isfinite().all():
        raise ValueError("cannot show images that hold NaN or infinity")
    # Nearest-neighbor enlargement: smoothing would hide what the model has drawn.
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


def middle_frames(videos: Tensor) -> Tensor:
    """Middle frame [N, C, H, W] of each clip [N, C, T, H, W], for still images."""
    return videos[:, :, videos.shape[2] // 2]


def animated_grid(
    videos: Tensor,
    columns: int,
    column_labels: Sequence[str] = (),
    scale: int | None = None,
    padding: int = 8,
    *,
    fps: float = 8.0,
    kind: Literal["gif", "png", "webp"] = "gif",
) -> bytes:
    """Lay clips out like `image_grid` and play them at once, in an animation that loops forever.

    Args:
        videos: [N, 3, T, H, W] in [-1, 1]; one channel is shown as gray.
        columns, column_labels, scale, padding: as for `image_grid`.
        fps: frames a second; a GIF, which counts in hundredths of a second, gets the nearest rate.
        kind: GIF plays everywhere but has 256 colors; animated PNG and WebP (lossless here) have all colors.

    Returns:
        The bytes of the file.

    Raises:
        ValueError: as `image_grid`, no frames, or an invalid rate.
    """
    if videos.dim() != 5 or not videos.shape[2]:
        raise ValueError(f"cannot show {list(videos.shape)} as clips: expected [N, 3, T, H, W]")
    if not 0 < fps < math.inf:
        raise ValueError(f"cannot play {fps} frames a second")
    frames = [image_grid(images, columns, column_labels, scale, padding) for images in videos.unbind(2)]
    options: dict[str, Any] = (
        {"disposal": 1, "comment": MARK.encode()} if kind == "gif" else {"lossless": True} if kind == "webp" else {}
    )
    if kind == "gif":
        frames = _with_one_palette(frames)
    file = io.BytesIO()
    frames[0].save(
        file, kind, save_all=True, append_images=frames[1:], duration=max(1, round(1000 / fps)), loop=0, **options
    )
    return file.getvalue()


def _with_one_palette(frames: list[Image.Image]) -> list[Image.Image]:
    """Quantize all frames to a common palette of 256 colors, so that static regions do not flicker."""
    width, height = frames[0].size
    strip = Image.new("RGB", (width, height * len(frames)))
    for i, frame in enumerate(frames):
        strip.paste(frame, (0, i * height))
    palette = strip.quantize(256, Image.Quantize.MEDIANCUT)
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]


def write_grid(
    pixels: Tensor, output: Location, columns: int, column_labels: Sequence[str] = (), *, fps: float = 8.0
) -> list[Location]:
    """Write a PNG of images; for clips, a PNG of their middle frames and an animated GIF beside it.

    Args:
        pixels: [N, 3, T, H, W] in [-1, 1]; images have T = 1.
        output: the PNG; the GIF has the same name with .gif instead of .png.

    Returns:
        The files written.

    Raises:
        DataError: a file cannot be written, or one is there that this project did not write.
        ValueError: as `image_grid`.
    """
    png = io.BytesIO()
    software = PngInfo()
    software.add_text("Software", MARK)
    image_grid(middle_frames(pixels), columns, column_labels).save(png, "PNG", pnginfo=software)
    files = [(output, png.getvalue())]
    if pixels.shape[2] > 1:
        gif = output.parent / f"{output.name.removesuffix('.png')}.gif"
        files.append((gif, animated_grid(pixels, columns, column_labels, fps=fps)))
    for location, _ in files:
        refuse_to_replace(location)
    try:
        for location, content in files:
            location.write(content)
    except OSError as error:
        raise DataError(f"cannot write the image grid {output}: {error}; choose another place") from None
    return [location for location, _ in files]


def to_images(images: Tensor) -> list[Image.Image]:
    """Convert images [N, 1 or 3, H, W] in [-1, 1] to PIL images."""
    return [Image.fromarray(pixels) for pixels in _pixels(images)]


def _pixels(images: Tensor) -> np.ndarray:
    """Convert images [N, 1 or 3, H, W] in [-1, 1] to uint8 [N, H, W, 3]."""
    rgb = images.float().expand(-1, 3, -1, -1).clamp(-1, 1)
    return ((rgb + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _header(labels: Sequence[str], width: int, padding: int) -> Image.Image:
    """Header line: each label centered over its column, and truncated where it would overlap the next."""
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
