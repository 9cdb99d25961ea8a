"""Draw samples from a model: on one process from a checkpoint, or on all ranks during training.

Shapes: B samples of a batch, N samples, C channels, T frames, H height, W width.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from rdm_scale.codecs import LatentCodec, codec_of
from rdm_scale.conditions import TextCondition, select_conditions
from rdm_scale.conditions import batch_size as batch_size_of
from rdm_scale.config import RunConfig
from rdm_scale.data.compatibility import DataFacts
from rdm_scale.diffusion import sample
from rdm_scale.diffusion.samplers import Model
from rdm_scale.errors import ConfigError, NonFiniteError
from rdm_scale.sampling.image_grid import image_grid, middle_frames

if TYPE_CHECKING:
    from rdm_scale.parallel.mesh import Mesh  # megatron-core takes seconds to import

GRID_ROWS = 4


def draw_latents(
    model: Model,
    config: RunConfig,
    condition: Tensor | TextCondition,
    seed: int,
    *,
    empty_caption: TextCondition | None = None,
    first_index: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draw normalized latents [B, C, T, H, W] for labels [B] or captions, with the sampler of `config.sampling`.

    Noise is a function of the seed and the sample's index, not of the batch. A model without condition uses only the
    number of labels.

    Args:
        empty_caption: the null condition of guidance, for a model with text.
        first_index: index of the first sample of this batch.
        progress: called as progress(steps_done, steps) after every step of the sampler.

    Raises:
        ConfigError: labels for a model that takes captions, or captions for one that does not.
    """
    size, kind = config.model.input, config.model.condition
    if (kind == "text") != isinstance(condition, TextCondition):
        raise ConfigError(
            f"the model has model.condition={kind}: draw with {'prompts' if kind == 'text' else 'labels'}"
        )
    return sample(
        model,
        (batch_size_of(condition), size.channels, size.frames, size.height, size.width),
        None if kind == "none" else condition,
        config.sampling.steps,
        config.sampling.guidance,
        seed,
        diffusion=config.diffusion,
        sampler=config.sampling.sampler,
        null_condition={"none": None, "class": config.model.num_classes, "text": empty_caption}[kind],
        learned_variance=config.model.learned_variance,
        first_index=first_index,
        progress=progress,
        device=condition.pooled.device if isinstance(condition, TextCondition) else condition.device,
    )


def draw_pixels(
    model: Model,
    config: RunConfig,
    codec: LatentCodec,
    condition: Tensor | TextCondition,
    seed: int,
    *,
    batch_size: int,
    empty_caption: TextCondition | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Tensor:
    """Draw and decode pixels [N, 3, T, H, W] in [-1, 1] for labels [N] or captions, in batches; images have T = 1.

    Latents are drawn on the device of the condition and decoded on that of the codec; pixels are returned on the CPU.
    `progress` is called after each batch as progress(samples done, samples).

    Raises:
        NonFiniteError: a sample holds NaN or infinity.
    """
    parts, samples = [], batch_size_of(condition)
    for first in range(0, samples, batch_size):
        part = select_conditions(condition, slice(first, first + batch_size))
        latents = draw_latents(model, config, part, seed, empty_caption=empty_caption, first_index=first)
        refuse_non_finite_samples(latents)
        parts.append(codec.decode(latents).cpu())
        if progress is not None:
            progress(min(first + batch_size, samples), samples)
    return torch.cat(parts)


def refuse_non_finite_samples(latents_NCTHW: Tensor) -> None:
    """Raise NonFiniteError if a sample that was drawn holds NaN or infinity."""
    bad = int((~latents_NCTHW.isfinite()).flatten(1).any(dim=1).sum())
    if bad:
        count = len(latents_NCTHW)
        cause = "the weights are unusable: use an earlier checkpoint" if bad == count else "the sampler diverged"
        raise NonFiniteError(
            f"{bad} of {count} samples hold NaN or infinity: {cause}, or try a lower guidance or more sampling steps"
        )


class SampleGrid:
    """Image grid of samples of the model in training, with the same labels and noise at every call.

    The data-parallel ranks divide the samples. The first rank loads the codec on construction, so that a missing codec
    stops the run before it starts.
    """

    def __init__(self, config: RunConfig, mesh: "Mesh", facts: DataFacts) -> None:
        self.config, self.mesh = config, mesh
        self.columns, self.names = config.monitor.sample_columns, list[str]()
        if config.model.condition == "class":
            self.columns = min(self.columns, config.model.num_classes)
            self.names = list(facts.class_names[: self.columns])
        self.codec = codec_of(facts.codec, mesh.device) if mesh.is_first else None

    def draw(self, model: Model, progress: Callable[[int, int], None] | None = None) -> Image.Image | None:
        """Draw the grid and return it on the first rank, None on the others. Collective.

        Clips are shown by their middle frames. `progress` is called on every rank after every step of the sampler; what
        it raises ends the drawing.

        Raises:
            ConfigError: the configuration's sampler cannot draw; on all ranks.
            NonFiniteError: a sample holds NaN or infinity; on the first rank, after all have drawn.
        """
        count = self.columns * GRID_ROWS
        share = -(-count // self.mesh.data_size)  # the same on all ranks: each takes part in every forward
        labels = torch.arange(share * self.mesh.data_size) % self.columns
        first = share * self.mesh.data_rank
        latents = draw_latents(
            model,
            self.config,
            labels[first : first + share].to(self.mesh.device),
            seed=0,
            first_index=first,
            progress=progress,
        )
        # Ranks of one model replica have drawn the same samples: the sum over the data ranks has each of them once.
        parts = latents.new_zeros(self.mesh.data_size, *latents.shape)
        parts[self.mesh.data_rank] = latents
        all_latents = self.mesh.all_reduce_sum_over_data(parts).flatten(0, 1)[:count].to(latents.dtype)
        if self.codec is None:
            return None
        refuse_non_finite_samples(all_latents)
        return image_grid(middle_frames(self.codec.decode(all_latents)).cpu(), self.columns, self.names)
