"""Clips against a plain decode of the whole file, frame rates by hand-worked examples."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from PIL import Image

from rdm_scale.encoding.images import decode as decode_image
from rdm_scale.encoding.video_stream import TimedFrame, VideoStream
from rdm_scale.encoding.videos import VideoMetadata, decode_clip, read_video_metadata
from rdm_scale.errors import DataError
from tests.support.clip_files import all_frames, clip_of, counting, digit_clip, metadata_of, numbers, video

REORDERED = {"bf": "2", "g": "8"}  # B-frames, and several key frames in a clip
KINDS = [
    ("mp4", "libx264", "yuv420p", (48, 64), REORDERED),
    ("mov", "libx264", "yuv444p10le", (49, 65), REORDERED),
    ("mp4", "libx265", "yuv420p10le", (48, 64), {"x265-params": "log-level=none:keyint=8:pools=1"}),
    ("matroska", "libx264", "yuv420p", (48, 64), REORDERED),
    ("matroska", "ffv1", "gray", (49, 65), {}),
    ("webm", "libvpx", "yuv420p", (48, 64), {"g": "8", "auto-alt-ref": "1", "lag-in-frames": "8"}),
    ("webm", "libvpx-vp9", "yuv420p", (49, 65), {"g": "8"}),
    ("avi", "mpeg4", "yuv420p", (48, 64), {"g": "8", "qscale": "2"}),
    ("avi", "mpeg4", "yuv420p", (49, 65), REORDERED | {"qscale": "2"}),
    ("avi", "libx264", "yuv420p", (48, 64), REORDERED),
    ("avi", "mjpeg", "yuvj420p", (49, 65), {}),
]


def test_a_real_clip_is_what_a_plain_decode_gives(bunny: bytes) -> None:
    assert metadata_of(bunny) == VideoMetadata(frames=50, height=180, width=320, fps=25.0)
    linear = all_frames(bunny)
    for start in (49, 0, 13, 12, 11, 25, 37):  # in no order, on and around key frames
        assert torch.equal(clip_of(bunny, start, height=180, width=320)[:, 0], linear[:, start])
    strided = clip_of(bunny, 3, 8, stride=6, height=180, width=320)
    assert torch.equal(strided, linear[:, 3:50:6]) and strided.dtype == torch.float32
    assert linear.std(dim=1).mean() > 0.02, "the frames must differ for this test to mean anything"


def test_decoding_starts_at_the_key_frame_before(bunny: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    plain = VideoStream.frames

    def counted(video: VideoStream) -> Iterator[TimedFrame]:
        for frame in plain(video):
            decoded.append(round(frame.time * 25))
            yield frame

    monkeypatch.setattr(VideoStream, "frames", counted)
    clip_of(bunny, 30, 2)
    assert decoded == list(range(24, 32))


@pytest.mark.parametrize(("container", "codec", "pixels", "size", "options"), KINDS)
def test_every_container(container: str, codec: str, pixels: str, size: tuple[int, int], options: dict) -> None:
    content = video(counting(30, *size), container, codec, pixels=pixels, options=options)
    height, width = size
    assert metadata_of(content) == VideoMetadata(30, height, width, 24.0)
    linear = all_frames(content)
    assert all(abs(number - i) <= 1 for i, number in enumerate(numbers(linear)))  # mpeg4 loses a little
    for start in (29, 0, 7, 8, 9, 20):
        assert torch.equal(clip_of(content, start, height=height, width=width)[:, 0], linear[:, start]), start
    with pytest.raises(DataError, match=r"a video ends at 1\.250 s, before the frame at 1\.250 s"):
        clip_of(content, 29, 2)


def test_another_frame_rate() -> None:
    """At 10 a second frame i is shown at i / 10 s, which is frame floor(2.4 i) of 24 a second."""
    content = video(counting(30), options=REORDERED)
    expected = [0, 2, 4, 7, 9, 12, 14, 16, 19, 21, 24, 26, 28]  # 1.3 s is beyond 30 / 24 = 1.25 s
    assert metadata_of(content, 10.0) == VideoMetadata(len(expected), 48, 64, 10.0)
    assert numbers(clip_of(content, 0, 13, fps=10.0)) == expected
    assert numbers(clip_of(content, 1, 4, fps=10.0, stride=3)) == expected[1::3]
    # A higher rate shows frames several times: i / 60 s is frame floor(0.4 i).
    assert numbers(clip_of(content, 20, 7, fps=60.0)) == [8, 8, 8, 9, 9, 10, 10]
    assert metadata_of(content, 60.0).frames == 75
    assert metadata_of(content, 0.5).frames == 1


@pytest.mark.parametrize(("container", "codec"), [("matroska", "libx264"), ("webm", "libvpx-vp9"), ("mp4", "libx264")])
def test_a_variable_frame_rate(container: str, codec: str) -> None:
    times = [0, 40, 80, 200, 240, 1000, 1040, 1500]  # milliseconds
    content = video(counting(8), container, codec, rate=25, times=times)
    # 0, 100, 200 ms, ...: the last frame that is not later
    expected = [0, 2, 3, 4, 4, 4, 4, 4, 4, 4, 5, 6, 6, 6, 6, 7]
    frames = metadata_of(content, 10.0).frames
    assert frames == 16 or (container == "mp4" and frames == 23)  # whose writer makes the last frame long
    assert numbers(clip_of(content, frames - 1, fps=10.0)) == [7]
    assert numbers(clip_of(content, 0, 16, fps=10.0)) == expected
    assert [numbers(clip_of(content, i, fps=10.0))[0] for i in range(16)] == expected


def test_pictures_are_resized_and_cut_as_images_are(bunny: bytes) -> None:
    frame = all_frames(bunny)[:, 20]
    png = io.BytesIO()
    Image.fromarray(((frame + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(png, "PNG")
    assert torch.equal(clip_of(bunny, 20, height=64, width=64)[:, 0], decode_image(png.getvalue(), 64, 64, "a picture"))
    # Of other shapes: the largest box around the centre, here all of the height or all of the width.
    half = clip_of(bunny, 20, height=90, width=160)[:, 0]
    tall = clip_of(bunny, 20, height=90, width=46)[:, 0]
    torch.testing.assert_close(tall[:, :, 2:-2], half[:, :, 59:101], atol=0.05, rtol=0)
    wide = clip_of(bunny, 20, height=20, width=160)[:, 0]
    torch.testing.assert_close(wide[:, 2:-2], half[:, 37:53], atol=0.05, rtol=0)


@pytest.mark.parametrize(("rotation", "corner"), [(90, (1, 0)), (180, (1, 1)), (-90, (0, 1))])
def test_rotated_files_are_shown_upright(rotation: int, corner: tuple[int, int]) -> None:
    """The red quarter, top left in the file, goes where turning counterclockwise by `rotation` brings it."""
    content = video(counting(3), rotation=rotation)
    size = metadata_of(content)
    assert (size.height, size.width) == ((64, 48) if rotation != 180 else (48, 64))
    clip = clip_of(content, 0, height=size.height, width=size.width)[0, 0]  # the red of the first frame
    red = (clip.unflatten(0, (2, -1)).unflatten(2, (2, -1)).mean((1, 3)) > 0).nonzero().tolist()
    assert red == [list(corner)]


def test_pixels_that_are_not_square() -> None:
    content = video(counting(3), pixel_aspect=Fraction(2, 1))
    size = metadata_of(content)
    assert (size.height, size.width) == (48, 128)
    quarter = clip_of(content, 0, height=24, width=64)[0, 0]
    assert quarter[:11, :31].min() > 0.8 and quarter[:, 33:].max() < -0.8 and quarter[13:].max() < -0.8


def test_the_same_clip_in_any_order_and_on_many_threads(bunny: bytes, tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    path.write_bytes(bunny)

    def clip(start: int) -> bytes:
        with path.open("rb") as file:
            return decode_clip(file, "v", fps=12.5, start=start, frames=4, height=32, width=32).numpy().tobytes()

    starts = [3, 15, 0, 9, 20, 3, 12, 0, 20, 9]
    alone = {start: clip(start) for start in sorted(starts, reverse=True)}
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(clip, starts)) == [alone[start] for start in starts]
    file = io.BytesIO(bunny)
    first = decode_clip(file, "v", fps=12.5, start=9, frames=4, height=32, width=32)
    assert not file.closed and first.numpy().tobytes() == alone[9]
    read_video_metadata(file, "v")
    assert decode_clip(file, "v", fps=12.5, start=0, frames=4, height=32, width=32).numpy().tobytes() == alone[0]


@pytest.mark.parametrize("container", ["mp4", "avi", "webm", "mkv", "mov"])
def test_clips_of_digits(container: str) -> None:
    content = digit_clip(3, container)
    assert metadata_of(content) == VideoMetadata(24, 32, 32, 24.0)
    clip = clip_of(content, 0, 24, height=32, width=32)
    assert clip.amax() > 0.7 and clip.mean() < -0.5  # bright strokes on black
    assert (clip[:, 0] - clip[:, -1]).abs().max() > 1  # that move


def test_an_impossible_clip_is_the_fault_of_the_caller(bunny: bytes) -> None:
    for wrong in ({"start": -1}, {"frames": 0}, {"stride": 0}, {"fps": 0.0}, {"width": 0}):
        with pytest.raises(ValueError, match="impossible clip"):
            clip_of(bunny, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="impossible frame rate"):
        metadata_of(bunny, 0.0)
