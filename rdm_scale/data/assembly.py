"""Batches assembled from samples of open sets."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rdm_scale import rng
from rdm_scale.batch import LatentBatch
from rdm_scale.codecs.codec import clamp_log_variance, normalize_
from rdm_scale.conditions import TextCondition
from rdm_scale.config import DataConfig, DataSource
from rdm_scale.data.manifest import Manifest, Shape
from rdm_scale.data.reader import (
    OpenDataset,
    Samples,
    open_dataset,
    stack_as_float,
)
from rdm_scale.dtypes import STORED_DTYPES
from rdm_scale.errors import ConfigError

Sources = str | Path | Sequence[DataSource]


def open_datasets(sources: Sources, config: DataConfig | None) -> tuple[list[OpenDataset], DataConfig]:
    if isinstance(sources, str | Path):
        sources = [DataSource(path=str(sources))]
    config = config or DataConfig(train=tuple(sources))
    return [open_dataset(source, config.options) for source in sources], config


def assemble(
    step: int,
    positions: Sequence[int],
    found: Sequence[tuple[Samples, int]],
    shape: Shape,
    manifest: Manifest,
    seed: int,
    purpose: str,
) -> LatentBatch:
    """
    Args:
        found: of each sample what was read, and its index there.
    """
    if manifest.kind == "moments":
        noise = [torch.randn(shape, generator=rng.generator(seed, purpose, position)) for position in positions]
        moments = stack_as_float(found, manifest.stored_shape(shape), STORED_DTYPES[manifest.dtype].torch)
        latents = normalize_(posterior_sample(moments, torch.stack(noise)), manifest.codec)
    else:
        latents = stack_as_float(found, shape, STORED_DTYPES[manifest.dtype].torch, manifest.codec)
    return LatentBatch(
        step=step,
        positions=_integers(positions),
        ids=_integers([samples.ids[index] for samples, index in found]),
        labels=_integers([samples.labels[index] for samples, index in found]),
        latents=latents,
        text=TextCondition.from_captions([run.captions[i] for run, i in found]) if found[0][0].captions else None,
    )


def _integers(values: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.array(values, np.int64))  # torch.tensor takes three times as long


def posterior_sample(moments: Tensor, noise: Tensor) -> Tensor:
    """A draw from the posterior: moments [B, 2C, T, H, W] and noise [B, C, T, H, W] to raw latents [B, C, T, H, W]."""
    mean, log_variance = moments.chunk(2, dim=1)
    return mean + (0.5 * clamp_log_variance(log_variance)).exp() * noise


def check_ranks(dp_rank: int, dp_size: int) -> None:
    if not 0 <= dp_rank < dp_size:
        raise ConfigError(f"there is no data-parallel rank {dp_rank} of {dp_size}")
