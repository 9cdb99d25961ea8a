"""Codecs and tools give on a GPU what they give on the CPU, but for rounding."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rdm_scale.codecs import load_codec
from tests.support.rank_pool import RankPool
from tests.support.small_runs import run_config, train, write_latents

pytestmark = pytest.mark.gpu
TOOLS = Path(__file__).parents[2] / "tools"


def test_codec(gpu: torch.device) -> None:
    pixels = torch.rand(4, 3, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    here, there = load_codec("digits"), load_codec("digits", gpu)
    moments = here.encode(pixels)
    latents = moments[:, : here.channels]
    # convolutions round their inputs to 10 bits there
    assert (there.encode(pixels).cpu() - moments).norm() < 3e-3 * moments.norm()
    assert (there.decode(latents).cpu() - here.decode(latents)).norm() < 3e-3 * here.decode(latents).norm()


def test_samples_of_a_run(tmp_path: Path) -> None:
    """A run on the GPU, drawn from there and on the CPU."""
    data = write_latents(tmp_path / "latents", channels=3)
    config = run_config(tmp_path, data, model__input__channels=3, train__steps=10, sampling__steps=5)
    RankPool(gpu=True).run(1, train, config)
    pictures = []
    for name, environment in (("gpu", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": ""})):
        picture = tmp_path / f"{name}.png"
        command = [sys.executable, str(TOOLS / "sample.py"), config.run.dir, str(picture), "--rows", "2"]
        subprocess.run(command, check=True, env=os.environ | environment)
        pictures.append(np.asarray(Image.open(picture), np.int16))
    assert pictures[0].std() > 10 and np.abs(pictures[0] - pictures[1]).max() <= 2
