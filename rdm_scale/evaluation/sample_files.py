"""Generated samples as files: PNG images, or mp4 clips."""

import io
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location

_OPTIONS = {"crf": "12", "threads": "1"}  # of x264: nearly lossless


def write_media(folder: Location, chunks: Iterable[NDArray[np.uint8]], fps: int) -> int:
    """Write uint8 samples [B, T, H, W, 3] to `00000000.png`, ..., or `.mp4` where T is above 1; returns their number.

    Raises:
        DataError: a file cannot be written.
    """
    count = 0
    try:
        folder.make_dir()
        for chunk in chunks:
            for sample in chunk:
                extension, content = ("png", png(sample[0])) if len(sample) == 1 else ("mp4", mp4(sample, fps))
                (folder / f"{count:08d}.{extension}").write(content)
                count += 1
    except OSError as error:
        raise DataError(f"cannot write samples to {folder}: {error.strerror or error}; make room there") from None
    return count


def png(image: NDArray[np.uint8]) -> bytes:
    """Encode an image [H, W, 3]."""
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return content.getvalue()


def mp4(clip: NDArray[np.uint8], fps: int) -> bytes:
    """Encode a clip [T, H, W, 3]; an odd height or width is padded by repeating the last pixels."""
    import av

    padded = np.pad(clip, ((0, 0), (0, clip.shape[1] % 2), (0, clip.shape[2] % 2), (0, 0)), mode="edge")
    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as output:
        stream: Any = output.add_stream("libx264", rate=fps, options=_OPTIONS)
        stream.height, stream.width, stream.pix_fmt = padded.shape[1], padded.shape[2], "yuv420p"
        for i, picture in enumerate(padded):
            frame: Any = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, fps)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return content.getvalue()
