"""Decoded video frames to upright pixels in sRGB: orientation, color space and transparency."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rdm_scale.encoding.color import BT2020, HLG, PQ, UNSPECIFIED, ColorSpace, convert_to_srgb
from rdm_scale.encoding.images import CropBox, ImageSize, center_box, is_enlarged
from rdm_scale.encoding.remarks import Remarks
from rdm_scale.errors import DataError

ODD_MATRIX = "display matrices that are no quarter turns or mirrorings were ignored"
Pixels = NDArray[np.uint8]  # [H, W, 3]
_SKEW = 0.1  # of a matrix that still counts as one of quarter turns
# Matrix coefficients (ITU-T H.273) that FFmpeg's conversion knows; the others have no meaning for RGB.
_MATRICES = {1: "BT.709", 4: "FCC", 5: "BT.601", 6: "BT.601", 7: "SMPTE 240M", BT2020: "BT.2020"}
_NO_MATRIX = (0, UNSPECIFIED, 3)
_BT709 = 1
_HD_WIDTH, _HD_HEIGHT = 1280, 576  # a frame as wide, or higher, is BT.709 unless it says otherwise, as in players


class Orientation(NamedTuple):
    """Steps that turn a stored frame upright: first transposed, then mirrored."""

    transposed: bool = False  # height and width are exchanged
    mirrored: bool = False  # left and right are exchanged
    flipped: bool = False  # top and bottom are exchanged

    def apply(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """Turn pixels [H, W, ...] upright."""
        upright = pixels.swapaxes(0, 1) if self.transposed else pixels
        upright = upright[:, ::-1] if self.mirrored else upright
        return np.ascontiguousarray(upright[::-1] if self.flipped else upright)


def frame_orientation(frame: Any, name: str, remarks: Remarks | None = None) -> Orientation:
    """Orientation of a frame by its display matrix.

    The matrix maps the place (x, y) of a stored pixel to (a x + c y, b x + d y). Its scale does not matter here. One
    that is neither diagonal nor antidiagonal, or all zero, says nothing.

    Args:
        remarks: where to count a matrix that is ignored.
    """
    from av.sidedata.sidedata import Type

    stated = frame.side_data.get(Type.DISPLAYMATRIX)
    if stated is None:
        return Orientation()
    a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(stated), np.int32)[:5])
    straight, crossed = min(abs(a), abs(d)), min(abs(b), abs(c))
    if straight and max(abs(b), abs(c)) <= _SKEW * straight:
        return Orientation(False, a < 0, d < 0)
    if crossed and max(abs(a), abs(d)) <= _SKEW * crossed:
        return Orientation(True, c < 0, b < 0)
    if remarks is not None and any((a, b, c, d)):
        remarks.add(ODD_MATRIX, name)
    return Orientation()


def square_width(width: int, pixel_aspect: float) -> int:
    """Width of a frame in square pixels."""
    return max(1, round(width * pixel_aspect))


@dataclass
class FrameConverter:
    """Converter of the frames of a video to pixels in sRGB.

    Frames are turned upright, laid over white where they are transparent, then cropped and resized as `images.decode`
    does.

    Args:
        height, width: of the result.
        pixel_aspect: width of a stored pixel over its height.
        name: of the video, for error messages.
        remarks: where to count what cannot be used.

    Attributes:
        enlarged: size of frames that were enlarged, in square pixels; None: none was.
    """

    height: int
    width: int
    pixel_aspect: float
    name: str
    remarks: Remarks | None = None

    def __post_init__(self) -> None:
        from av.video.reformatter import VideoReformatter

        self._reformatter = VideoReformatter()
        self.enlarged: ImageSize | None = None

    def convert(self, frame: Any) -> Pixels:
        """Convert a frame to uint8 [height, width, 3].

        Raises:
            DataError: its colors cannot be converted.
        """
        space = ColorSpace(int(frame.color_primaries), int(frame.color_trc))
        if (unsupported := space.unsupported) is not None:
            raise DataError(f"the video {self.name} has {unsupported}, which is not supported: convert it to BT.709")
        orientation = frame_orientation(frame, self.name, self.remarks)
        transparent = any(component.is_alpha for component in frame.format.components)
        if space.is_srgb:
            image = Image.fromarray(orientation.apply(self._rgb(frame, "rgba" if transparent else "rgb24", space)))
            if transparent:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            return np.asarray(self._resize(image, orientation))
        if transparent:
            raise DataError(
                f"the video {self.name} has transparent frames of a wide color gamut or high dynamic range, which are "
                "not supported: convert it to BT.709"
            )
        channels = orientation.apply(self._rgb(frame, "rgb48le", space)).astype(np.float32) / 65535
        planes = [self._resize(Image.fromarray(channels[..., i]), orientation) for i in range(3)]
        colors = np.stack([np.asarray(plane) for plane in planes], axis=-1).astype(np.float64).clip(0, 1)
        return np.rint(convert_to_srgb(colors, space) * 255).astype(np.uint8)

    def _rgb(self, frame: Any, pixel_format: str, space: ColorSpace) -> NDArray[Any]:
        """Pixels of a frame as stored, in RGB of its own color space."""
        matrix = int(frame.colorspace)
        if matrix not in _MATRICES and matrix not in _NO_MATRIX:
            raise DataError(
                f"the video {self.name} has matrix coefficients {matrix} (ITU-T H.273), which are not supported, only "
                f"those of {', '.join(dict.fromkeys(_MATRICES.values()))}: convert it to BT.709"
            )
        if matrix in _NO_MATRIX and not frame.format.is_rgb:
            matrix = _usual_matrix(frame, space)
        source = matrix if matrix in _MATRICES else None
        rgb = self._reformatter.reformat(frame, format=pixel_format, src_colorspace=source, threads=1)
        pixels: NDArray[Any] = rgb.to_ndarray()
        return pixels

    def _resize(self, image: Image.Image, orientation: Orientation) -> Image.Image:
        """Crop and resize an upright image of any mode."""
        aspect = 1 / self.pixel_aspect if orientation.transposed else self.pixel_aspect
        square = square_width(image.width, aspect)
        left, top, right, bottom = center_box(image.height, square, self.height, self.width)
        if is_enlarged(image.height, square, self.height, self.width):
            self.enlarged = ImageSize(image.height, square)
        stretch = image.width / square
        box = CropBox(left * stretch, top, min(right * stretch, image.width), bottom)
        return image.resize((self.width, self.height), Image.Resampling.BICUBIC, box=box)


def _usual_matrix(frame: Any, space: ColorSpace) -> int:
    """Matrix coefficients of a frame that does not state them."""
    if space.transfer in (PQ, HLG) or space.primaries == BT2020:
        return BT2020
    return _BT709 if frame.width >= _HD_WIDTH or frame.height > _HD_HEIGHT else UNSPECIFIED
