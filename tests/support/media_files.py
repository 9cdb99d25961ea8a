"""Images, tars and what stands for a video, as tests write them."""

import io
from pathlib import Path

from PIL import Image

from rdm_scale.storage.ustar import pack_ustar


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flat(color: object, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new(mode, size, color)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.write_bytes(pack_ustar(members.items()).content)


RED, BLUE = encoded(flat("red")), encoded(flat("blue"))
MOVIE = bytes(range(256)) * 40
