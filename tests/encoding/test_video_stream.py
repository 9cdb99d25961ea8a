"""Videos that are damaged, truncated or too large, and files that are not videos."""

import io

import numpy as np
import pytest
import torch

from rdm_scale.encoding.video_stream import VideoLimits
from rdm_scale.encoding.videos import decode_clip, read_video_metadata
from rdm_scale.errors import DataError
from tests.support.clip_files import BUNNY, clip_of, counting, digit_clip, metadata_of, video


def index_at_the_end(frames: int = 48) -> bytes:
    """An mp4 as cameras write it: without its last bytes there is no index."""
    return video(counting(frames), options={"g": "12"})


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_files(bunny: bytes, share: float) -> None:
    cut = bunny[: int(share * len(bunny))]
    assert metadata_of(cut).frames == 50  # the index is at the front and knows nothing of it
    assert torch.equal(clip_of(cut, 0, 5), clip_of(bunny, 0, 5))  # what is there is good
    with pytest.raises(DataError, match=r"cut\.mp4: it is damaged or truncated; repair or remove it"):
        clip_of(cut, 40, 10, name="cut.mp4")
    content = index_at_the_end()
    with pytest.raises(DataError, match="cannot decode the video a video"):
        metadata_of(content[: int(0.7 * share * len(content))])
    for container in ("avi", "mkv", "webm"):
        content = digit_clip(0, container)
        with pytest.raises(DataError, match="a video"):
            clip_of(content[: int(share * len(content))], 0, 24)


def test_corrupted_bytes_are_never_shown_as_grey_blocks(bunny: bytes) -> None:
    """A video carries no checksums, so a flip may decode; then the pictures must be nearly those of before."""
    whole, generator = clip_of(bunny, 0, 50), np.random.default_rng(0)
    outcomes = []
    for _ in range(30):
        bad = bytearray(bunny)
        place = generator.integers(4000, len(bad) - 64)
        bad[place : place + 64] = generator.bytes(64)
        try:
            outcomes.append(float((clip_of(bytes(bad), 0, 50) - whole).abs().mean()))
        except DataError as error:
            assert "a video" in str(error)
            outcomes.append(-1.0)
    assert outcomes.count(-1.0) >= 24 and max(outcomes) < 0.05


def test_damage_elsewhere_does_not_matter(bunny: bytes) -> None:
    bad = bytearray(bunny)
    bad[-20_000:] = b"\0" * 20_000
    assert torch.equal(clip_of(bytes(bad), 0, 10), clip_of(bunny, 0, 10))
    with pytest.raises(DataError):
        clip_of(bytes(bad), 45, 5)


def test_damaged_headers_raise_nothing_else(bunny: bytes) -> None:
    generator = np.random.default_rng(1)
    contents = [bunny, *(digit_clip(0, container) for container in ("mp4", "avi", "webm"))]
    for content in contents:
        for _ in range(20):
            bad = bytearray(content)
            for place in generator.integers(0, min(3000, len(bad)), 4):
                bad[place] = generator.integers(256)
            for call in (metadata_of, clip_of):
                try:
                    call(bytes(bad))  # type: ignore[operator]
                except DataError as error:
                    assert "a video" in str(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a video file of a supported format"),
        (b"These are words, not pictures.", r"words.mp4 is not a video file of a supported format \(mp4, avi"),
        (b"#EXTM3U\n#EXTINF:1\nfile:///etc/hostname\n", "not a video file of a supported format"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", "not a video file of a supported format"),
        (b"\0\0\0\x18ftypisom" + b"words " * 100, "cannot decode the video words.mp4"),
        (b"RIFF\xff\xff\0\0AVI " + b"words " * 100, "words.mp4"),
        (b"\x1a\x45\xdf\xa3" + b"words " * 100, "words.mp4"),
    ],
)
def test_what_is_no_video(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_video_metadata(io.BytesIO(content), "words.mp4")
    with pytest.raises(DataError, match=message):
        clip_of(content, name="words.mp4")


def test_limits(bunny: bytes) -> None:
    with pytest.raises(DataError, match="a video claims to have 199900000 frames"):
        metadata_of(bunny, 1e8)
    limits = VideoLimits(pixels=320 * 179)
    with pytest.raises(DataError, match="a video has frames of 320 x 180 pixels; at most 57280 are decoded"):
        read_video_metadata(io.BytesIO(bunny), "a video", limits=limits)
    with pytest.raises(DataError, match=f"a video has {len(bunny)} bytes: too large"):
        clip_of(bunny, limits=VideoLimits(file_bytes=1000))


def test_a_file_that_cannot_be_read() -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 1000:
                raise OSError("the connection was lost")
            return super().read(size)

    with pytest.raises(DataError, match=r"cannot read far\.mp4: the connection was lost"):
        decode_clip(Broken(BUNNY.read_bytes()), "far.mp4", fps=None, start=0, frames=50, height=8, width=8)
