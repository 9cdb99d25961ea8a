"""Sampling requests: from labels or prompts to the conditions of samples, and on to pixels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rdm_scale.checkpoint.trained_model import TrainedModel
from rdm_scale.codecs import codec_of
from rdm_scale.conditions import TextCondition, batch_size, select_conditions
from rdm_scale.config import RunConfig, parse_config
from rdm_scale.data.captions import empty_caption
from rdm_scale.encoding.text import encode_prompts
from rdm_scale.errors import ConfigError
from rdm_scale.sampling.generate import draw_pixels


@dataclass(frozen=True)
class SamplingRequest:
    """Conditions of the samples to draw, row by row of an image grid with a column for each distinct condition.

    Attributes:
        condition: class labels int64 [N], of which a model without condition uses the number only, or N captions.
        columns: number of distinct conditions, which the N samples repeat in the same order.
        names: class name or prompt of each column; empty without condition.
        empty_caption: the null condition of guidance, for a model with text.
    """

    condition: Tensor | TextCondition
    columns: int
    names: tuple[str, ...] = ()
    empty_caption: TextCondition | None = None

    @property
    def samples(self) -> int:
        """Number N of samples."""
        return batch_size(self.condition)


def request_unconditional(columns: int, rows: int = 1) -> SamplingRequest:
    """Request `rows` x `columns` samples without condition."""
    return SamplingRequest(torch.zeros(columns * rows, dtype=torch.int64), columns)


def request_labels(trained: TrainedModel, labels: Sequence[int], rows: int = 1) -> SamplingRequest:
    """Request `rows` samples of each class label; `num_classes` is the null class.

    Raises:
        ConfigError: the model takes no labels, or has no such class.
    """
    model = trained.config.model
    if model.condition != "class":
        raise ConfigError(f"the model has model.condition={model.condition}: it takes no class labels")
    if not labels or not all(0 <= label <= model.num_classes for label in labels):
        last = model.num_classes - 1
        raise ConfigError(f"labels {list(labels)}: give labels from 0 to {last}, or {last + 1} for no class")
    known = dict(enumerate(trained.class_names)) | {model.num_classes: "no class"}
    names = tuple(known.get(label, str(label)) for label in labels)
    return SamplingRequest(torch.tensor(labels).repeat(rows), len(labels), names)


def request_prompts(
    trained: TrainedModel, prompts: Sequence[str], rows: int = 1, text_encoder: str | None = None
) -> SamplingRequest:
    """Request `rows` samples of each prompt.

    Args:
        text_encoder: folder of the text encoder; None: where it was when the captions were encoded.

    Raises:
        ConfigError: the model takes no captions, or there are no prompts.
        DataError: there is no such text encoder, or it is a different one.
    """
    if trained.text is None or not prompts:
        kind = trained.config.model.condition
        raise ConfigError(
            f"the model has model.condition={kind} and got {len(prompts)} prompts: give prompts to a model with "
            "model.condition=text"
        )
    captions = encode_prompts(trained.text, prompts, text_encoder)
    condition = select_conditions(captions, torch.arange(len(prompts)).repeat(rows))
    return SamplingRequest(condition, len(prompts), tuple(prompts), empty_caption(trained.text))


_CONDITION_OF_OPTION = {"labels": "class", "prompt": "text", "prompts": "text", "text_encoder": "text"}


def refuse_unused_options(config: RunConfig, **given: object) -> None:
    """Refuse options of a tool that a model of this condition would ignore.

    Args:
        given: values of `labels`, `prompt` and `text_encoder`, as far as the tool has them.

    Raises:
        ConfigError: one of them is given, and the model takes another condition.
    """
    kind = config.model.condition
    for name, value in given.items():
        if value and kind != _CONDITION_OF_OPTION[name]:
            taken = {"class": "it takes class labels", "text": "it takes prompts", "none": "it takes no condition"}[
                kind
            ]
            raise ConfigError(f"the model has model.condition={kind}, {taken}: leave out --{name.replace('_', '-')}")


def refuse_untrained_guidance(config: RunConfig) -> None:
    """Refuse guidance by a null condition that no sample was trained with; its embedding is as it was initialized.

    Raises:
        ConfigError: `sampling.guidance` is not 1 and the null condition was never trained.
    """
    if config.sampling.guidance != 1 and not config.trains_null_condition:
        raise ConfigError(
            f"guidance {config.sampling.guidance:g} needs the null condition, which this model was never trained with "
            "(diffusion.condition_dropout=0): draw with guidance 1, or train with diffusion.condition_dropout above 0"
        )


def override_sampling(config: RunConfig, source: str, **values: object) -> RunConfig:
    """Replace values of the section `sampling`; None keeps the configured value.

    Args:
        source: origin of the values, for error messages.

    Raises:
        ConfigError: a value is invalid.
    """
    tree = config.model_dump(mode="json")
    given = {key: value for key, value in values.items() if value is not None}
    return parse_config(tree | {"sampling": tree["sampling"] | given}, source)


def draw_request(
    trained: TrainedModel,
    request: SamplingRequest,
    seed: int,
    *,
    config: RunConfig | None = None,
    batch_size: int = 64,
    progress: Callable[[int, int], object] | None = None,
) -> Tensor:
    """Draw and decode the samples of a request: pixels [N, 3, T, H, W] in [-1, 1] on the CPU; images have T = 1.

    Args:
        config: default: the model's own.
        progress: called after each batch as progress(samples done, samples).

    Raises:
        ConfigError: as `refuse_untrained_guidance`.
        NonFiniteError: a sample is not finite.
    """
    config = config or trained.config
    refuse_untrained_guidance(config)
    device = next(trained.model.parameters()).device
    return draw_pixels(
        trained.model,
        config,
        codec_of(trained.codec, device),
        request.condition.to(device),
        seed,
        batch_size=batch_size,
        empty_caption=request.empty_caption,
        progress=progress,
    )
