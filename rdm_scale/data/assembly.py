"""Assembly of batches: raw latents of samples in memory become a normalized float32 `LatentBatch`."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rdm_scale import rng
from rdm_scale.batch import LatentBatch
from rdm_scale.codecs.codec import clamp_log_variance, normalize_
from rdm_scale.codecs.record import CodecRecord
from rdm_scale.conditions import TextCondition
from rdm_scale.data.buffer_pool import BufferPool
from rdm_scale.data.loaded_samples import LoadedSample
from rdm_scale.data.manifest import Manifest, Shape
from rdm_scale.dtypes import STORED_DTYPES

_LARGE_BYTES = 2**16  # for larger samples, creating a tensor costs little compared with copying it
_BLOCK_BYTES = 2**20  # small samples are gathered and converted in blocks of this size


def assemble(
    samples: Sequence[LoadedSample],
    shape: Shape,
    manifest: Manifest,
    *,
    step: int,
    positions: Sequence[int],
    seed: int,
    purpose: str,
    buffers: BufferPool,
) -> LatentBatch:
    """Assemble the batch of a step; moments are sampled with noise keyed by (seed, purpose, position).

    Args:
        shape: [C, T, H, W] of the latents.
        manifest: manifest of the data set that all samples belong to.
        positions: position of each sample in the run.
        buffers: memory for the latents.
    """
    dtype = STORED_DTYPES[manifest.dtype].torch
    if manifest.kind == "moments":
        noise = [torch.randn(shape, generator=rng.generator(seed, purpose, position)) for position in positions]
        moments = stack_float32(samples, manifest.stored_shape(shape), dtype, buffers)
        latents = normalize_(posterior_sample(moments, torch.stack(noise)), manifest.codec)
    else:
        latents = stack_float32(samples, shape, dtype, buffers, manifest.codec)
    captions = [one.captions[index] for one, index in samples if one.captions]
    return LatentBatch(
        step=step,
        positions=_int64(positions),
        ids=_int64([one.ids[index] for one, index in samples]),
        labels=_int64([one.labels[index] for one, index in samples]),
        latents=latents,
        text=TextCondition.from_captions(captions) if captions else None,
    )


def posterior_sample(moments: Tensor, noise: Tensor) -> Tensor:
    """Sample of the VAE's posterior: mean + exp(log_variance / 2) noise.

    Source: Kingma & Welling 2014 (arXiv 1312.6114), eq. 10.

    Args:
        moments: [B, 2C, T, H, W], means and then log-variances.
        noise: [B, C, T, H, W].

    Returns:
        Raw latents [B, C, T, H, W].
    """
    mean, log_variance = moments.chunk(2, dim=1)
    return mean + (0.5 * clamp_log_variance(log_variance)).exp() * noise


def stack_raw(samples: Sequence[LoadedSample], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Copy samples of one stored shape into a tensor [B, *shape]."""
    size = samples[0].samples.sample_bytes
    # For 8 KiB samples, assigning slices one by one, torch.stack and np.concatenate all take longer.
    content = bytearray().join([one.content[(start := one.starts[i]) : start + size] for one, i in samples])
    return torch.frombuffer(content, dtype=dtype).view(len(samples), *shape)


def stack_float32(
    samples: Sequence[LoadedSample],
    shape: Sequence[int],
    dtype: torch.dtype,
    buffers: BufferPool,
    codec: CodecRecord | None = None,
) -> Tensor:
    """Stack samples of one stored shape in float32 and, given a codec, normalize them to unit scale.

    Works in blocks that fit in the processor's cache. Large samples are converted one by one, directly from the bytes
    that were read.
    """
    size = samples[0].samples.sample_bytes
    target = buffers.take(len(samples) * math.prod(shape) * 4).view(torch.float32).view(len(samples), *shape)
    length = 1 if size >= _LARGE_BYTES else _BLOCK_BYTES // size
    for number, block in enumerate(target.split(length)):
        block.copy_(_raw_block(samples[number * length :][:length], shape, dtype))
        if codec is not None:
            normalize_(block, codec)
    return target


def _raw_block(samples: Sequence[LoadedSample], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`stack_raw`, but a single sample is a view of the bytes that were read."""
    if len(samples) > 1:
        return stack_raw(samples, shape, dtype)
    ((one, index),) = samples
    raw = torch.frombuffer(one.content, dtype=torch.uint8, count=one.sample_bytes, offset=one.starts[index])
    return raw.view(dtype).view(1, *shape)


def _int64(values: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.array(values, np.int64))  # torch.tensor takes three times as long
