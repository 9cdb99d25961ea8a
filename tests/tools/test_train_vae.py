"""A codec trained in two steps: it loads, and its normalization is that of the latents of its training images."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from rdm_scale.codecs import load_codec, normalize
from rdm_scale.encoding.inputs import find_images
from rdm_scale.encoding.pixels import load_image_batches
from rdm_scale.encoding.planning import split_files
from rdm_scale.tools import train_vae
from tests.support.encoding_jobs import write_digits


def test_training_writes_a_codec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write_digits(tmp_path / "in", 40)
    out, preview = tmp_path / "vae", tmp_path / "preview.png"
    options = ["--size", "8", "--width", "4", "--steps", "2", "--holdout-share", "0.2", "--preview", str(preview)]
    monkeypatch.setattr(sys, "argv", ["train_vae", str(tmp_path / "in"), str(out), *options])
    train_vae.main()
    splits = split_files(find_images(str(tmp_path / "in")).files, 0, 0.2)
    assert f"on {len(splits.holdout)} held-out images" in capsys.readouterr().out
    codec = load_codec(str(out))
    ((_, pixels),) = load_image_batches(splits.train, 8, 40)
    latents = normalize(codec.encode(pixels.unsqueeze(2))[:, :4], codec.record).double()
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(4).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3, 4), correction=0), torch.ones(4).double(), atol=1e-4, rtol=0)
    assert Image.open(preview).width > 8
    with pytest.raises(SystemExit, match="exists already: choose another folder"):
        train_vae.main()
