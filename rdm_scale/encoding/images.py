"""Image decoding: PNG, JPEG or WebP bytes to a tensor of a given size.

Files are untrusted: the number of pixels is checked before decoding, and only the decoders of these formats are used.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from rdm_scale.errors import DataError

_FORMATS = ("PNG", "JPEG", "WEBP")
_MAX_PIXELS = 89_478_485  # PIL's own threshold, above which it warns of a decompression bomb
# Chunks of a PNG that may hold an orientation. To find those at its end, PIL would decode all pixels.
_PNG_ORIENTATION_CHUNKS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
_TRANSPOSING_ORIENTATIONS = (5, 6, 7, 8)  # of EXIF: height and width are exchanged


class ImageSize(NamedTuple):
    """Height and width of an image in pixels, after it is turned upright."""

    height: int
    width: int


class CropBox(NamedTuple):
    """Part of an image in (possibly fractional) pixels, in the form of the argument `box` of PIL's `resize`."""

    left: float
    top: float
    right: float
    bottom: float


def image_size(content: bytes, name: str) -> ImageSize:
    """Read the size of an encoded image from its header, without decoding pixels.

    Args:
        name: of the file, for error messages.

    Raises:
        DataError: it is not a PNG, JPEG or WebP, or has too many pixels.
    """
    with _opened(content, name) as image:
        oriented = image.format != "PNG" or any(chunk in content for chunk in _PNG_ORIENTATION_CHUNKS)
        transposed = oriented and image.getexif().get(ExifTags.Base.Orientation) in _TRANSPOSING_ORIENTATIONS
        return ImageSize(image.width, image.height) if transposed else ImageSize(image.height, image.width)


def decode(content: bytes, height: int, width: int, name: str) -> Tensor:
    """Decode an image to RGB, float32 [3, height, width] in [-1, 1], upright and center-cropped.

    The largest centered box with the target's aspect ratio is resized with PIL's antialiased bicubic filter, without
    resizing the rest of the image, which may be huge. Transparency is blended over white.

    Args:
        name: of the file, for error messages.

    Raises:
        DataError: it is not a PNG, JPEG or WebP, is damaged, or has too many pixels.
    """
    with _opened(content, name) as image:
        rgb = _to_rgb(ImageOps.exif_transpose(image))
    box = center_box(rgb.height, rgb.width, height, width)
    pixels = rgb.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 127.5 - 1


def center_box(height: int, width: int, to_height: int, to_width: int) -> CropBox:
    """Largest box with the aspect ratio of to_height x to_width in the center of an image.

    Its size may be fractional; its top left corner is at an integer position, as for a plain crop.
    """
    if width * to_height >= height * to_width:
        box_height, box_width = float(height), height * to_width / to_height
    else:
        box_height, box_width = width * to_height / to_width, float(width)
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return CropBox(left, top, left + box_width, top + box_height)


@contextmanager
def _opened(content: bytes, name: str) -> Iterator[Image.Image]:
    """Open an image and check its number of pixels. Errors inside the `with` block also become DataError."""
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise DataError(
                    f"{name} has {image.width} x {image.height} pixels; at most {_MAX_PIXELS} are decoded: shrink it"
                )
            yield image
    except DataError:
        raise
    except UnidentifiedImageError:  # its message only names a buffer by its address
        raise DataError(f"cannot decode the image {name}: it is not a PNG, JPEG or WebP; repair or remove it") from None
    except Exception as error:  # for a damaged file the decoders raise exceptions of many types
        raise DataError(f"cannot decode the image {name}: {error}; repair or remove it") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray, which PIL's own conversion would clip at 255
        image = Image.fromarray(np.rint(np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
