"""Loading the model and tokenizer of a text encoder with transformers, without running code from its folder."""

import inspect
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from rdm_scale.encoding.text_encoder_folder import TextEncoderFolder
from rdm_scale.errors import DataError

_MODEL_CLASSES = {  # by model_type of config.json
    "albert": "AlbertModel",
    "bert": "BertModel",
    "camembert": "CamembertModel",
    "clip": "CLIPTextModelWithProjection",
    "clip_text_model": "CLIPTextModel",
    "distilbert": "DistilBertModel",
    "electra": "ElectraModel",
    "modernbert": "ModernBertModel",
    "mpnet": "MPNetModel",
    "mt5": "MT5EncoderModel",
    "roberta": "RobertaModel",
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "xlm-roberta": "XLMRobertaModel",
}
# Models that number positions from pad_token_id + 1: the first entries of their tables are unused.
_POSITIONS_AFTER_PADDING = ("camembert", "mpnet", "roberta", "xlm-roberta")
_DEFAULT_MAX_TOKENS = 512  # if neither the model nor its tokenizer has a limit, as for T5
_NO_LIMIT = 10**6  # tokenizers without a limit have one of 10^30


class LoadedTextModel(NamedTuple):
    """A text encoder's model and tokenizer, with the limits on tokens."""

    model: Any  # a PreTrainedModel, in the dtype of its weights
    tokenizer: Any
    most_tokens: int  # limit of the model
    default_tokens: int  # length that it was trained for


def load_text_model(folder: TextEncoderFolder) -> LoadedTextModel:
    """Load the model and tokenizer of a folder.

    Raises:
        DataError: the class of the model is not supported, weights are missing or damaged, or its configuration
            describes a far larger model than the weights.
    """
    kind = folder.config.get("model_type")
    if kind not in _MODEL_CLASSES:
        raise DataError(
            f"{folder.location} contains a {kind} model: supported text encoders are {', '.join(_MODEL_CLASSES)}"
        )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the library is imported
    import transformers  # takes seconds

    try:
        with _quiet(transformers):
            shapes = _weight_shapes(folder)
            name = "CLIPTextModelWithProjection" if "text_projection.weight" in shapes else _MODEL_CLASSES[kind]
            model_class = getattr(transformers, name)
            config = model_class.config_class.from_pretrained(folder.path, local_files_only=True)
            pooler = folder.pooling is None and any("pooler." in name for name in shapes)
            takes = inspect.signature(model_class.__init__).parameters
            chosen = {"add_pooling_layer": pooler} if "add_pooling_layer" in takes else {}
            _check_parameters(model_class, config, chosen, shapes)
            model, info = model_class.from_pretrained(
                folder.path,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **chosen,
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder.path, local_files_only=True, trust_remote_code=False, use_fast=True
            )
            if missing := sorted(info["missing_keys"]):
                raise ValueError(f"{len(missing)} weights are missing, the first is {missing[0]}")
    except Exception as error:  # an untrusted configuration makes the constructors fail in many ways
        raise DataError(f"cannot load a text encoder from {folder.location}: {first_lines(error)}") from None
    limit = _position_limit(folder, model)
    return LoadedTextModel(model, tokenizer, limit, min(limit, *_trained_lengths(folder, tokenizer)))


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence warnings about unused weights (the decoder or heads of a model) and progress bars."""
    log = transformers.utils.logging
    before, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(before)
        if bars:
            log.enable_progress_bar()


def _weight_shapes(folder: TextEncoderFolder) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for path in folder.weights:
        with safe_open(path, "pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return shapes


def _check_parameters(model_class: Any, config: Any, chosen: dict[str, bool], shapes: dict[str, list[int]]) -> None:
    """Refuse a configuration of a far larger model than the weights: memory must be bounded by the files."""
    with torch.device("meta"):
        expected = sum(parameter.numel() for parameter in model_class(config, **chosen).parameters())
    stored = sum(map(math.prod, shapes.values()))
    if expected > 2 * stored + 10**6:
        raise ValueError(
            f"the configuration describes {expected} parameters, but the weights have only {stored} elements"
        )


def _position_limit(folder: TextEncoderFolder, model: Any) -> int:
    """Number of usable entries of the table of positions."""
    table: int = getattr(model.config, "max_position_embeddings", None) or _NO_LIMIT
    if folder.config["model_type"] in _POSITIONS_AFTER_PADDING:
        table -= model.config.pad_token_id + 1
    return table


def _trained_lengths(folder: TextEncoderFolder, tokenizer: Any) -> list[int]:
    """Limits on the number of tokens, from the folder and the tokenizer."""
    lengths = [
        value
        for value in (folder.max_tokens, tokenizer.model_max_length)
        if isinstance(value, int) and 0 < value < _NO_LIMIT
    ]
    return lengths or [_DEFAULT_MAX_TOKENS]


def first_lines(error: Exception) -> str:
    """First two lines of an exception's message, or the name of its type if it has none."""
    return " ".join(str(error).strip().splitlines()[:2]) or type(error).__name__
