"""Image decoding: PNG, JPEG or WebP bytes to a tensor of a given size.

Files are untrusted: the number of pixels is checked before decoding, only the decoders of these formats are used, and
damage that they would hide is looked for.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from rdm_scale.encoding.color import UNREADABLE_PROFILE, ColorSpace, convert_by_profile, convert_to_srgb
from rdm_scale.encoding.image_damage import jpeg_damage, webp_damage
from rdm_scale.encoding.png_chunks import SIGNATURE, PngPicture, read_png
from rdm_scale.encoding.remarks import Remarks
from rdm_scale.errors import DataError

_FORMATS = ("PNG", "JPEG", "WEBP")
_MAX_PIXELS = 89_478_485  # PIL's own threshold, above which it warns of a decompression bomb
# By the orientation of EXIF, what makes the image upright; 1: nothing.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ENLARGED = "enlarged, since they are smaller than the size that is encoded (--min-size leaves such inputs out)"
_EXCHANGING = (5, 6, 7, 8)  # orientations that exchange height and width
_PIXELS_AT_ONCE = 2**20  # converted in floating point


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
    with _opened(content, name) as opened:
        height, width = opened.image.height, opened.image.width
        return ImageSize(width, height) if opened.orientation in _EXCHANGING else ImageSize(height, width)


def decode(content: bytes, height: int, width: int, name: str, remarks: Remarks | None = None) -> Tensor:
    """Decode an image to sRGB, float32 [3, height, width] in [-1, 1], upright and center-cropped.

    The largest centered box with the target's aspect ratio is resized with PIL's antialiased bicubic filter, without
    resizing the rest of the image, which may be huge. Colors are converted to sRGB by the ICC profile, if there is one,
    or the code points of a PNG. Transparency is blended over white.

    Args:
        name: of the file, for error messages.
        remarks: where to count that a color profile could not be used.

    Raises:
        DataError: it is not a PNG, JPEG or WebP, is damaged, or has too many pixels.
    """
    with _opened(content, name) as opened:
        if (damage := opened.damage(content)) is not None:
            raise DataError(f"the image {name} is damaged: {damage}; repair or remove it")
        rgb = opened.to_srgb(name, remarks)
    box = center_box(rgb.height, rgb.width, height, width)
    pixels = rgb.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 127.5 - 1


def is_enlarged(height: int, width: int, to_height: int, to_width: int) -> bool:
    """True if the center of an image of height x width is enlarged to to_height x to_width."""
    box = center_box(height, width, to_height, to_width)
    return box.bottom - box.top < to_height


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


class _OpenedImage:
    """An image whose header has been read, with what its file says about orientation and colors."""

    def __init__(self, image: Image.Image, png: PngPicture | None) -> None:
        self.image, self._png = image, png

    @property
    def orientation(self) -> int:
        """Orientation by EXIF; 1, upright, if there is none or it cannot be read."""
        if self._png is not None and not self._png.oriented:
            return 1  # PIL would decode all pixels to look for one behind them
        try:
            found = self.image.getexif().get(ExifTags.Base.Orientation)
        except Exception:  # damaged metadata raise exceptions of many types
            return 1
        return found if found in _UPRIGHT else 1

    def damage(self, content: bytes) -> str | None:
        """Decode the image and say what is wrong with its file; None if nothing is found."""
        if self._png is not None and self._png.damage is not None:
            return self._png.damage
        self.image.load()
        if self.image.format == "WEBP":
            return webp_damage(content)
        return None if self._png is not None else jpeg_damage(content)

    def to_srgb(self, name: str, remarks: Remarks | None) -> Image.Image:
        """The upright image in sRGB, over white where it is transparent."""
        image, alpha = _split_alpha(self.image, None if self._png is None else self._png.transparent)
        profile = self.image.info.get("icc_profile") if self._png is None else self._png.profile
        points = None if self._png is None else self._png.code_points
        if points is not None:
            image = _convert_by_code_points(image.convert("RGB"), ColorSpace(*points), name)
        elif profile is not None:
            converted = convert_by_profile(image, profile)
            if converted is None and remarks is not None:
                remarks.add(UNREADABLE_PROFILE, name)
            image = image if converted is None else converted
        image = image.convert("RGB")
        if alpha is not None:
            image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
        orientation = self.orientation
        return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


@contextmanager
def _opened(content: bytes, name: str) -> Iterator[_OpenedImage]:
    """Open an image and check its number of pixels. Errors inside the `with` block also become DataError."""
    try:
        png = read_png(content) if content.startswith(SIGNATURE) else None
        with Image.open(io.BytesIO(content if png is None else png.content), formats=_FORMATS) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise DataError(
                    f"{name} has {image.width} x {image.height} pixels; at most {_MAX_PIXELS} are decoded: shrink it"
                )
            yield _OpenedImage(image, png)
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise DataError(
            f"{name} has far more than {_MAX_PIXELS} pixels, the most that are decoded: shrink it"
        ) from None
    except UnidentifiedImageError:  # its message only names a buffer by its address
        raise DataError(f"cannot decode the image {name}: it is not a PNG, JPEG or WebP; repair or remove it") from None
    except Exception as error:  # for a damaged file the decoders raise exceptions of many types
        raise DataError(f"cannot decode the image {name}: {error}; repair or remove it") from None


class _ColorsAndAlpha(NamedTuple):
    colors: Image.Image  # modes L, RGB or CMYK
    alpha: Image.Image | None  # mode L


def _split_alpha(image: Image.Image, transparent: tuple[int, ...] | None) -> _ColorsAndAlpha:
    """Split the colors of an image from its opacity.

    Args:
        transparent: the one color of a PNG that is transparent, in levels as decoded.
    """
    alpha = None
    if transparent is not None:
        differs = np.asarray(image.convert("L") if image.mode == "1" else image) != transparent
        alpha = Image.fromarray(differs.reshape(*differs.shape[:2], -1).any(-1).astype(np.uint8) * 255)
    if image.mode.startswith("I"):  # 16-bit gray, which PIL's own conversion would clip at 255
        image = Image.fromarray(np.rint(np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    if alpha is None and image.has_transparency_data:
        image = image.convert("RGBA")
        return _ColorsAndAlpha(image.convert("RGB"), image.getchannel("A"))
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return _ColorsAndAlpha(image, alpha)


def _convert_by_code_points(image: Image.Image, space: ColorSpace, name: str) -> Image.Image:
    """Convert an RGB image from a color space to sRGB."""
    if (unsupported := space.unsupported) is not None:
        raise DataError(f"the image {name} has {unsupported}, which is not supported: convert it to sRGB")
    if space.is_srgb:
        return image
    pixels = np.array(image)
    for row in range(0, len(pixels), rows := max(1, _PIXELS_AT_ONCE // image.width)):
        pixels[row : row + rows] = np.rint(convert_to_srgb(pixels[row : row + rows] / 255, space) * 255)
    return Image.fromarray(pixels)
