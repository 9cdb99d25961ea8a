"""Conversion of colors to sRGB: from ICC profiles of images, and from the color spaces of video.

Video states its color space by the numbers of ITU-T H.273. High dynamic range is tone-mapped from a display of 1000
cd/m2 to one of 203 cd/m2, the level of diffuse white by ITU-R BT.2408.
"""

import io
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

UNREADABLE_PROFILE = "color profiles that cannot be used were ignored"
UNSPECIFIED, BT2020 = 2, 9  # primaries and matrix coefficients have the same numbers for these
PQ, HLG, _LINEAR = 16, 18, 8
_UNSUPPORTED_TRANSFERS = {9: "logarithmic", 10: "logarithmic", 17: "SMPTE ST 428-1"}
_XYZ = 10
# Chromaticities of red, green, blue and white.
_SRGB = (0.640, 0.330, 0.300, 0.600, 0.150, 0.060, 0.3127, 0.3290)
_WIDE_GAMUTS = {
    BT2020: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, 0.3127, 0.3290),
    11: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.314, 0.351),  # DCI P3
    12: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.3127, 0.3290),  # Display P3
}
_PEAK, _WHITE = 1000.0, 203.0  # cd/m2
# Constants of SMPTE ST 2084 (PQ) and of HLG, as ITU-R BT.2100 gives them.
_M1, _M2 = 2610 / 16384, 2523 / 4096 * 128
_C1, _C2, _C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
_A, _B, _C = 0.17883277, 0.28466892, 0.55991073
_LUMINANCE_2020 = np.array([0.2627, 0.6780, 0.0593])
_GRID = 9  # levels of each channel at which profiles are compared
_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}

Colors = NDArray[np.float64]  # [..., 3]


class ColorSpace(NamedTuple):
    """Color primaries and transfer function, by their numbers in ITU-T H.273."""

    primaries: int
    transfer: int

    @property
    def unsupported(self) -> str | None:
        """Name of what cannot be converted; None if everything can."""
        if self.primaries == _XYZ:
            return "XYZ colors"
        name = _UNSUPPORTED_TRANSFERS.get(self.transfer)
        return None if name is None else f"a {name} transfer function"

    @property
    def is_srgb(self) -> bool:
        """True if values are shown as those of sRGB are.

        That is so for all video of standard dynamic range and gamut: players use the display's own curve.
        """
        return self.primaries not in _WIDE_GAMUTS and self.transfer not in (PQ, HLG, _LINEAR)


def convert_to_srgb(rgb: Colors, space: ColorSpace) -> Colors:
    """Convert non-linear R'G'B' in [0, 1] to sRGB in [0, 1].

    Colors outside the gamut of sRGB are clipped. PQ and HLG have the primaries of BT.2020 unless others are stated.
    """
    high = space.transfer in (PQ, HLG)
    if high:
        light = _tone_map(_pq_to_light(rgb) if space.transfer == PQ else _hlg_to_light(rgb))
    else:
        light = rgb if space.transfer == _LINEAR else _srgb_to_light(rgb)
    primaries = BT2020 if high and space.primaries == UNSPECIFIED else space.primaries
    if primaries in _WIDE_GAMUTS:
        light = light @ _gamut_matrix(primaries).T
    light = light.clip(0, 1)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)  # IEC 61966-2-1


def convert_by_profile(image: Image.Image, profile: bytes) -> Image.Image | None:
    """Convert an image (modes L, RGB, CMYK) from its ICC profile to sRGB; None if the profile cannot be used for it."""
    transform = _transform(profile)
    if transform is None:
        return None
    if transform.mode != image.mode:
        if (image.mode, transform.mode) != ("L", "RGB"):
            return None
        image = image.convert("RGB")
    return image if transform.transform is None else transform.transform.apply(image)


class _Transform(NamedTuple):
    mode: str  # of the images that the profile describes
    transform: ImageCms.ImageCmsTransform | None  # None: the profile is that of sRGB


@lru_cache(maxsize=32)
def _transform(profile: bytes) -> _Transform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODES[source.profile.xcolor_space]
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode == "RGB" and _is_identity(transform):
            return _Transform(mode, None)
        return _Transform(mode, transform)
    except (ImageCms.PyCMSError, OSError, KeyError, ValueError, TypeError):
        return None


def _is_identity(transform: ImageCms.ImageCmsTransform) -> bool:
    """True if a transform changes no color by more than one level of 8 bits: rounding by another way to write sRGB."""
    levels = np.linspace(0, 255, _GRID).round().astype(np.uint8)
    colors = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(_GRID**2, _GRID, 3)
    converted = np.asarray(transform.apply(Image.fromarray(colors)))
    return int(np.abs(converted.astype(int) - colors).max()) <= 1


def _pq_to_light(signal: Colors) -> Colors:
    """EOTF of PQ, in cd/m2 (ITU-R BT.2100, table 4)."""
    power = signal ** (1 / _M2)
    return 10_000 * ((power - _C1).clip(0) / (_C2 - _C3 * power)) ** (1 / _M1)


def _light_to_pq(light: Colors) -> Colors:
    power = (light / 10_000) ** _M1
    return ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2


def _hlg_to_light(signal: Colors) -> Colors:
    """EOTF of HLG on a display of 1000 cd/m2, without black lift, in cd/m2 (ITU-R BT.2100, table 5)."""
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - _C) / _A) + _B) / 12)
    luminance = scene @ _LUMINANCE_2020
    return _PEAK * scene * luminance[..., None] ** 0.2


def _srgb_to_light(signal: Colors) -> Colors:
    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


def _tone_map(light: Colors) -> Colors:
    """Light in cd/m2 to [0, 1], by the EETF of ITU-R BT.2390 (section 5.4.1) on the largest channel."""
    largest = light.max(axis=-1, keepdims=True).clip(1e-6, _PEAK)
    source_peak, target_peak = _light_to_pq(np.array([_PEAK, _WHITE]))
    level, top = _light_to_pq(largest) / source_peak, target_peak / source_peak
    knee = 1.5 * top - 0.5
    t = ((level - knee) / (1 - knee)).clip(0, 1)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * top
    mapped = _pq_to_light(np.where(level < knee, level, spline) * source_peak)
    return light.clip(0, _PEAK) * (mapped / largest) / _WHITE


@lru_cache
def _gamut_matrix(primaries: int) -> NDArray[np.float64]:
    """Matrix [3, 3] from linear light of other primaries to that of sRGB, with the same white."""
    return np.linalg.inv(_to_xyz(_SRGB)) @ _to_xyz(_WIDE_GAMUTS[primaries])


def _to_xyz(chromaticities: tuple[float, ...]) -> NDArray[np.float64]:
    """Matrix [3, 3] from linear RGB to XYZ, scaled so that white is (1, 1, 1)."""
    points = np.array(chromaticities).reshape(4, 2)
    xyz = np.stack([points[:, 0] / points[:, 1], np.ones(4), (1 - points.sum(1)) / points[:, 1]])
    colors, white = xyz[:, :3], xyz[:, 3]
    return colors * np.linalg.solve(colors, white) / white[:, None]
