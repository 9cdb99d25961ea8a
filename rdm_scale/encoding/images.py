"""Pixels of images: an encoded file to a tensor of the size that is wanted.

Files are untrusted: pixels are bounded before they are decoded, and only the PNG, JPEG and WebP decoders are used.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from rdm_scale.errors import DataError

_FORMATS = ("PNG", "JPEG", "WEBP")
_MAX_PIXELS = 89_478_485  # PIL's own threshold, above which it warns of a decompression bomb
# Where a PNG can say how it is to be turned. PIL looks for these at its end too, and decodes all of it on the way.
_PNG_ORIENTATIONS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width


def image_size(content: bytes, name: str) -> tuple[int, int]:
    """(height, width) of an encoded image as it is shown, upright; its pixels are not decoded.

    Raises:
        DataError: it is no PNG, JPEG or WebP, or has too many pixels; the message holds `name`.
    """
    with _opened(content, name) as image:
        oriented = image.format != "PNG" or any(mark in content for mark in _PNG_ORIENTATIONS)
        turned = oriented and image.getexif().get(ExifTags.Base.Orientation) in _TURNED
        return (image.width, image.height) if turned else (image.height, image.width)


def decode(content: bytes, height: int, width: int, name: str) -> Tensor:
    """An encoded image to float32 [3, height, width] in [-1, 1]: upright, RGB, transparency over white, centre crop.

    The largest centred box of the target's aspect is resized with PIL's antialiased bicubic filter. Only that box is
    ever computed, so that a long thin image does not grow to a huge one on the way.

    Raises:
        DataError: it is no PNG, JPEG or WebP, is damaged, or has too many pixels; the message holds `name`.
    """
    with _opened(content, name) as image:
        rgb = _to_rgb(ImageOps.exif_transpose(image))
    box = centre_box(rgb.height, rgb.width, height, width)
    pixels = rgb.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 127.5 - 1


def centre_box(height: int, width: int, to_height: int, to_width: int) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the largest box of the target's aspect in the middle of an image.

    Its sides may be fractions of pixels; its corner is a whole pixel, as a crop of whole pixels would have it.
    """
    if width * to_height >= height * to_width:
        box_height, box_width = float(height), height * to_width / to_height
    else:
        box_height, box_width = width * to_height / to_width, float(width)
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


@contextmanager
def _opened(content: bytes, name: str) -> Iterator[Image.Image]:
    """The image, its header read and its number of pixels checked; what goes wrong in the body is a DataError too."""
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise DataError(f"{name} has {image.width} x {image.height} pixels; at most {_MAX_PIXELS} are decoded")
            yield image
    except DataError:
        raise
    except Exception as error:  # the decoders raise whatever comes to them when a file is damaged
        raise DataError(f"cannot decode the image {name}: {error}; repair or remove it") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray, which PIL's own conversion would clip at 255
        image = Image.fromarray(np.rint(np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
