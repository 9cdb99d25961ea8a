"""Sets of samples: every source gives the same uint8 pixels, and ranks divide them without repetition."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rdm_scale.errors import DataError
from rdm_scale.evaluation.sample_sets import MediaOptions, SampleSet, kept_images, open_samples, read_array, to_uint8
from rdm_scale.tools.make_digit_clips import encode, render
from tests.support.small_runs import write_latents

CHOSEN = [0, 6, 8]  # the three lowest keys of eleven positions


def gathered(samples: SampleSet, ranks: int, batch_size: int = 4) -> np.ndarray:
    """Pixels of all ranks, in the order of their positions, each of which must come once."""
    batches = [batch for rank in range(ranks) for batch in samples.batches(batch_size, rank, ranks)]
    positions = torch.cat([batch.indices for batch in batches])
    assert sorted(positions.tolist()) == list(range(samples.count))
    return torch.cat([batch.pixels for batch in batches])[positions.argsort()].numpy()


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (11, 8, 6, 3), dtype=np.uint8)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_arrays_and_folders_of_the_same_images_are_the_same(tmp_path: Path, pixels: np.ndarray, ranks: int) -> None:
    np.savez(tmp_path / "a.npz", other=np.zeros(1), arr_0=pixels)
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i:02d}.png")
    for source in ("a.npz", "folder"):
        samples = open_samples(str(tmp_path / source))
        assert samples.size == (1, 8, 6) and np.array_equal(gathered(samples, ranks)[:, 0], pixels)
        chosen = kept_images(samples, 3)
        assert [[np.array_equal(one, image) for image in pixels].index(True) for one in chosen] == CHOSEN


@pytest.mark.parametrize("ranks", [1, 2])
def test_latent_sets_are_decoded_by_their_codec(tmp_path: Path, ranks: int) -> None:
    """With the codec identity, latents are pixels. Repeated samples that fill the last batches do not count."""
    manifest = write_latents(tmp_path / "latents", samples=13, channels=3)
    samples = open_samples(str(tmp_path / "latents"))
    assert (samples.count, samples.size) == (13, (1, 8, 8))
    found = gathered(samples, ranks)
    labels = torch.arange(13) % 4
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(13, 3, 1, 8, 8, generator=generator) * 0.5 + (labels - 1.5).view(-1, 1, 1, 1, 1)
    assert np.array_equal(found, to_uint8(latents).numpy())
    assert np.array_equal(gathered(open_samples(manifest), ranks), found)


def test_clips_are_read_with_their_stride(tmp_path: Path) -> None:
    clip = render(np.full((8, 8), 16.0), index=1, frames=12, size=32)
    (tmp_path / "clip.mp4").write_bytes(encode(clip, "mp4"))
    samples = open_samples(str(tmp_path), MediaOptions(frames=4, stride=3))
    assert samples.size == (4, 32, 32) and samples.stride == 3
    found = gathered(samples, 1)[0].astype(int)
    assert np.abs(found - clip[::3]).mean() < 4  # the video is compressed
    with pytest.raises(DataError, match="before the frame at"):
        gathered(open_samples(str(tmp_path), MediaOptions(frames=13)), 1)


def test_pixels_are_rounded_as_files_are() -> None:
    values = torch.tensor([-1.5, -1.0, -0.998, -0.993, 0.0, 1.0, 2.0])
    found = to_uint8(values.view(1, 1, 1, 1, -1).expand(-1, 3, -1, -1, -1))
    assert found[0, 0, 0, :, 0].tolist() == [0, 0, 0, 1, 128, 255, 255]
    with pytest.raises(DataError, match="generated pixels hold NaN"):
        to_uint8(torch.full((1, 3, 1, 2, 2), torch.nan))


def test_files_that_are_no_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", a=np.zeros(1), b=np.zeros(1))
    with pytest.raises(DataError, match="holds the arrays a, b, and none of them is arr_0"):
        read_array(str(tmp_path / "two.npz"))
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("nothing")
    for name in ("object.npy", "text.npy", "absent.npy"):
        with pytest.raises(DataError, match="cannot read the array"):
            read_array(str(tmp_path / name))
