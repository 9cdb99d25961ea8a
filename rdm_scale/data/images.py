"""A user's images: found in folders or webdataset tars, decoded to tensors of one size.

Finding reads names only (and the small `.cls` files of tars), so that any number of images fits; the bytes of an image
are read when it is decoded. Files are untrusted: sizes are bounded, and only the PNG, JPEG and WebP decoders are used.
"""

import io
import posixpath
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from rdm_scale.data.storage import Location
from rdm_scale.errors import DataError

EXTENSIONS = ("png", "jpg", "jpeg", "webp")
_FORMATS = ("PNG", "JPEG", "WEBP")
_MAX_FILE_BYTES = 2**28  # larger than any image within PIL's limit on pixels has a reason to be
_MAX_CLASS_BYTES = 1024
_MAX_CLASSES = 1_000_000
_UNFIT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # in a key; surrogates stand for bytes that are not UTF-8
_MAX_PIXELS = 89_478_485  # PIL's own threshold, above which it warns of a decompression bomb


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One image that has been found but not read: a file, or `length` bytes at `offset` of a tar."""

    key: str  # unique in its set: the path below the input, or the name in the tar, without the extension
    label: int  # index into the set's class names; -1 without classes
    location: Location
    name: str  # for messages: where a person finds it
    offset: int = 0
    length: int | None = None  # None: the whole file

    def read(self) -> bytes:
        """Raises DataError: the file cannot be read, is too large, or ends early."""
        try:
            length = self.location.size() if self.length is None else self.length
            if length > _MAX_FILE_BYTES:
                raise DataError(f"{self.name} has {length} bytes: too large for an image file")
            content = self.location.read_range(self.offset, length)
        except OSError as error:
            raise DataError(f"cannot read {self.name}: {error}") from None
        if len(content) != length:
            raise DataError(f"{self.name} ends after {len(content)} of {length} bytes: was it changed meanwhile?")
        return content

    def load(self, size: int) -> Tensor:
        """The decoded image, float32 [3, size, size] in [-1, 1]. Raises DataError as `read` and `decode` do."""
        return decode(self.read(), size, self.name)


@dataclass(frozen=True)
class ImageSet:
    images: tuple[ImageFile, ...]
    class_names: tuple[str, ...]  # empty: no classes, all labels are -1
    ignored: int  # files that are no images by their name


def decode(content: bytes, size: int, name: str) -> Tensor:
    """An encoded image to float32 [3, size, size] in [-1, 1]: upright, RGB, transparency over white, centre crop.

    The short side is resized to `size` with PIL's antialiased bicubic filter. Only the centred square is ever computed,
    so that a long thin image does not grow to a huge one on the way.

    Raises:
        DataError: it is no PNG, JPEG or WebP, is damaged, or has too many pixels; the message holds `name`.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise DataError(f"{name} has {image.width} x {image.height} pixels; at most {_MAX_PIXELS} are decoded")
            rgb = _to_rgb(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except Exception as error:  # the decoders raise whatever comes to them when a file is damaged
        raise DataError(f"cannot decode the image {name}: {error}; repair or remove it") from None
    short = min(rgb.size)
    left, top = (rgb.width - short) // 2, (rgb.height - short) // 2
    square = rgb.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + short, top + short))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray, which PIL's own conversion would clip at 255
        image = Image.fromarray(np.rint(np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def find_images(url: str) -> ImageSet:
    """All images of a folder, of a webdataset tar, or of many tars (a folder or a glob of them), sorted.

    In a folder (searched to its bottom) the class is the name of the sub-folder directly below it, if there are any.
    In a tar the class of `key.png` is in `key.cls`: its number, or a text. Hidden files are ignored, and files of
    other kinds, which are counted.

    Raises:
        DataError: nothing there, no images, a damaged tar, two images with one key, or only some with a class.
    """
    location = Location(url)
    try:
        tars = _find_tars(location)
        found, ignored = _in_tars(tars) if tars else _in_folder(location)
    except OSError as error:
        raise DataError(f"cannot read the input {location}: {error}") from None
    if not found:
        raise DataError(
            f"there are no images in {location}: it must be a folder of {', '.join(EXTENSIONS)} files, "
            "a webdataset tar, or a folder or glob of tars"
        )
    _check_keys(file for file, _ in found)
    labels, class_names = _number_classes([name for _, name in found], numbers=bool(tars), where=location)
    images = (
        ImageFile(file.key, label, file.location, file.name, file.offset, file.length)
        for (file, _), label in zip(found, labels, strict=True)
    )
    return ImageSet(tuple(images), class_names, ignored)


def load_images(url: str, size: int) -> tuple[Tensor, Tensor]:
    """All images of a small set at once: float32 [N, 3, size, size] in [-1, 1], and labels int64 [N].

    Raises DataError: as `find_images` and `decode` do.
    """
    images = find_images(url).images
    return torch.stack([image.load(size) for image in images]), torch.tensor([image.label for image in images])


_Found = tuple[list[tuple[ImageFile, str | None]], int]  # images with the name of their class, files ignored


def _find_tars(location: Location) -> list[Location]:
    """The tars that `location` stands for; empty when it is a folder of images."""
    if location.is_dir():
        names = location.names()
        tars = [name for name in names if name.endswith(".tar") and not name.startswith(".")]
        if tars and any(_extension(name) in EXTENSIONS for name in names):
            raise DataError(f"{location} holds both images and tars: keep them in folders of their own")
        return [location / name for name in tars]
    if location.exists():
        if not location.name.endswith(".tar"):
            raise DataError(f"{location} is neither a folder nor a .tar file (compressed tars must be unpacked first)")
        return [location]
    matches = [Location(path, location.fs) for path in sorted(location.fs.glob(location.path))]
    if not matches:
        raise DataError(f"the input {location} does not exist")
    if wrong := [match for match in matches if not match.name.endswith(".tar") or match.is_dir()]:
        raise DataError(f"{location} matches {wrong[0]}, which is not a .tar file")
    return matches


def _extension(name: str) -> str:
    return posixpath.splitext(name)[1][1:].lower()


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _in_folder(folder: Location) -> _Found:
    found: list[tuple[ImageFile, str | None]] = []
    ignored = 0
    for path in sorted(folder.fs.find(folder.path)):
        relative = path[len(folder.path) :].lstrip("/")
        if _is_hidden(relative):
            continue
        if _extension(relative) not in EXTENSIONS:
            ignored += 1
            continue
        file = Location(path, folder.fs)
        class_name = relative.split("/")[0] if "/" in relative else None
        found.append((ImageFile(posixpath.splitext(relative)[0], -1, file, str(file)), class_name))
    return found, ignored


def _in_tars(tars: list[Location]) -> _Found:
    found: list[tuple[ImageFile, str | None]] = []
    ignored = 0
    for tar in tars:
        try:
            images, classes, others = _index_tar(tar)
        except tarfile.TarError as error:
            raise DataError(f"{tar} is not a tar file, or a damaged one: {error}") from None
        found += [(image, classes.get(image.key)) for image in images]
        ignored += others
    return found, ignored


def _index_tar(location: Location) -> tuple[list[ImageFile], dict[str, str], int]:
    """Its images, the contents of its .cls files by key, and the number of other files."""
    images: list[ImageFile] = []
    classes: dict[str, str] = {}
    others = 0
    size = location.size()
    with location.open() as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            path = posixpath.normpath(member.name)
            if not member.isfile() or _is_hidden(path):
                continue
            name = f"{location}:{path}"
            folder, base = posixpath.split(path)
            stem, _, extension = base.partition(".")  # webdataset: a key ends at the first dot of the base name
            key, extension = posixpath.join(folder, stem), extension.lower()
            if extension in EXTENSIONS:
                images.append(ImageFile(key, -1, location, name, member.offset_data, member.size))
            elif extension == "cls":
                classes[key] = _read_class(tar, member, name)
            else:
                others += 1
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header it has read
        if tar.offset + tarfile.BLOCKSIZE > size:  # the end-of-archive block is missing
            raise DataError(f"{location} is cut short: it has no end-of-archive mark after {len(images)} images")
    return images, classes, others


def _read_class(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> str:
    content = tar.extractfile(member) if member.size <= _MAX_CLASS_BYTES else None
    if content is None:
        raise DataError(f"{name} has {member.size} bytes: too many for the number or name of a class")
    try:
        text = content.read().decode("utf-8").strip()
    except UnicodeDecodeError:
        raise DataError(f"{name} is not UTF-8 text: it must hold the number or name of a class") from None
    if not text:
        raise DataError(f"{name} is empty: it must hold the number or name of a class")
    return text


def _check_keys(files: Iterator[ImageFile]) -> None:
    seen: dict[str, str] = {}
    for file in files:
        if _UNFIT.search(file.key):
            raise DataError(f"the name of {file.name!r} holds a control character or is not UTF-8: rename it")
        if file.key in seen:
            raise DataError(f"{seen[file.key]} and {file.name} have the same key {file.key!r}: rename one of them")
        seen[file.key] = file.name


def _number_classes(names: list[str | None], *, numbers: bool, where: Location) -> tuple[list[int], tuple[str, ...]]:
    """Label of each image and the names of all classes; with `numbers`, names that are all numbers are the labels."""
    given = {name for name in names if name is not None}
    if not given:
        return [-1] * len(names), ()
    if missing := names.count(None):
        raise DataError(f"{where}: {missing} of {len(names)} images have no class: give all of them one, or none")
    if numbers and all(name.isascii() and name.isdigit() for name in given):
        if max(map(len, given)) > len(str(_MAX_CLASSES)) or max(map(int, given)) >= _MAX_CLASSES:
            raise DataError(f"{where}: a class number is not below {_MAX_CLASSES}")
        return [int(name) for name in names if name], tuple(str(i) for i in range(max(map(int, given)) + 1))
    ordered = sorted(given)
    index = {name: i for i, name in enumerate(ordered)}
    return [index[name] for name in names if name], tuple(ordered)
