"""A codec trained in two steps: it loads, and its normalization is that of the latents of its training images."""

import json
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


def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Path:
    """The folder of a codec of two steps."""
    out = tmp_path / "vae"
    few = ["--size", "8", "--width", "4", "--steps", "2", "--batch-size", "8", "--holdout-share", "0.2", *options]
    monkeypatch.setattr(sys, "argv", ["train_vae", str(tmp_path / "in"), str(out), *few])
    train_vae.main()
    return out


def test_images_that_cannot_be_decoded_are_left_out_as_in_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_digits(tmp_path / "in", 40)
    images = sorted((tmp_path / "in").rglob("*.png"))
    for path in images[::20]:  # of both splits
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(SystemExit, match=r"2 of 40 images cannot be decoded, more than a share of 0.01. The first: .*"):
        trained(tmp_path, monkeypatch)
    assert not (tmp_path / "vae").exists()
    out = trained(tmp_path, monkeypatch, "--max-rejected", "0.1")
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [line["input"] for line in lines] == [str(path) for path in images[::20]]
    assert all("damaged" in line["reason"] or "cannot decode" in line["reason"] for line in lines)
    assert "note: 2 images cannot be decoded and are left out" in capsys.readouterr().out
    load_codec(str(out))


def test_images_that_cannot_be_read_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_digits(tmp_path / "in", 10)
    rows = [{"path": str(path)} for path in sorted((tmp_path / "in").rglob("*.png"))]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path(rows[3]["path"]).unlink()
    monkeypatch.setattr(sys, "argv", ["train_vae", str(tmp_path / "list.jsonl"), str(tmp_path / "vae"), "--size", "8"])
    with pytest.raises(SystemExit, match="a failure of the place where inputs are stored, or a wrong path"):
        train_vae.main()
