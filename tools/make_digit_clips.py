"""Write clips of scikit-learn's scans of handwritten digits as a webdataset tar: small videos without a download.

Each clip shows one scan that moves along a line and grows or shrinks, on black. The tar holds `00000.mp4`, `00000.cls`
(the digit), `00001.mp4`, ... and tools/encode_latents.py reads it as it would a user's own videos. Clip i is the same
for any number of clips, and the same versions of the libraries write the same bytes.
"""

import argparse
import io
import sys
from fractions import Fraction

import numpy as np
from PIL import Image

from rdm_scale.config.paths import any_option
from rdm_scale.encoding.tars import pack_tar
from rdm_scale.progress import track
from rdm_scale.storage.location import Location

CODECS = {"mp4": "libx264", "avi": "mpeg4", "webm": "libvpx", "mkv": "libx264", "mov": "libx264"}
_OPTIONS = {  # nearly lossless, with a key frame every half second at 24 frames a second
    # Without cpu-independent, one clip in thirty differs between two runs on the same machine.
    "libx264": {"crf": "16", "g": "12", "threads": "1", "x264-params": "cpu-independent=1"},
    "mpeg4": {"qscale": "2", "g": "12", "threads": "1"},
    "libvpx": {"crf": "4", "b": "1M", "g": "12", "threads": "1", "deadline": "good", "cpu-used": "2"},
}
_FORMATS = {"mkv": "matroska"}  # where FFmpeg's name is another


def render(scan: np.ndarray, index: int, frames: int, size: int) -> np.ndarray:
    """Render a scan [8, 8] with values 0..16 as uint8 [frames, size, size, 3]; its motion depends on `index`."""
    small = Image.fromarray(np.rint(scan * (255 / 16)).astype(np.uint8))
    rng = np.random.default_rng(index)
    sides = rng.uniform(0.45, 0.95, 2) * size  # of the digit, at both ends of the clip
    places = rng.uniform(0, 1, (2, 2))  # of the digit in the room that its size leaves it
    clip = np.zeros((frames, size, size, 3), np.uint8)
    for i, t in enumerate(np.linspace(0, 1, frames)):
        side = round(sides[0] + t * (sides[1] - sides[0]))
        top, left = np.rint((places[0] + t * (places[1] - places[0])) * (size - side)).astype(int)
        digit = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))
        clip[i, top : top + side, left : left + side] = digit[..., None]
    return clip


def encode(clip: np.ndarray, container: str, fps: int = 24) -> bytes:
    """Encode frames uint8 [T, H, W, 3], of even height and width, as a video file."""
    import av

    buffer = io.BytesIO()
    codec = CODECS[container]
    with av.open(buffer, "w", format=_FORMATS.get(container, container), options={"fflags": "+bitexact"}) as output:
        stream = output.add_stream(codec, rate=fps, options=_OPTIONS[codec])
        stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], "yuv420p"
        for i, picture in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, fps)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


def clips_tar(clips: int, container: str = "mp4", frames: int = 24, size: int = 32, fps: int = 24) -> bytes:
    """The tar of `clips` clips; after the last scan the first one is used again, moving in another way."""
    from sklearn.datasets import load_digits  # slow to import, and not needed for --help

    scans, labels = load_digits(return_X_y=True)

    def sample(index: int) -> dict[str, bytes]:
        scan, label = scans[index % len(scans)].reshape(8, 8), labels[index % len(scans)]
        return {container: encode(render(scan, index, frames, size), container, fps), "cls": str(label).encode()}

    return pack_tar(map(sample, track(range(clips), "writing", "clip")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "output", type=any_option, metavar="OUTPUT.tar", help="where to write it (a path or any fsspec URL)"
    )
    parser.add_argument("--clips", type=int, default=1797, help="default: one of each scan (%(default)s)")
    parser.add_argument("--frames", type=int, default=24, help="frames of a clip (default: %(default)s)")
    parser.add_argument("--fps", type=int, default=24, help="frames a second (default: %(default)s)")
    parser.add_argument("--size", type=int, default=32, help="pixels a side, even (default: %(default)s)")
    parser.add_argument("--container", choices=sorted(CODECS), default="mp4", help="default: %(default)s")
    options = parser.parse_args()
    if min(options.clips, options.frames, options.fps) < 1 or options.size < 16 or options.size % 2:
        parser.error("--clips, --frames and --fps must be at least 1, and --size an even number from 16")
    output = Location(options.output)
    try:
        output.parent.make_dir()
        output.write(clips_tar(options.clips, options.container, options.frames, options.size, options.fps))
    except OSError as error:
        print(f"make_digit_clips: error: cannot write {output}: {error}", file=sys.stderr)
        return 1
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
