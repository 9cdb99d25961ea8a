"""Captions to vectors: text encoders of transformers, and the members of side-car shards that hold their output."""

import inspect
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import safe_open

from rdm_scale.conditions import TextCondition
from rdm_scale.data.captions import EncodedText
from rdm_scale.data.manifest import TextEncoding
from rdm_scale.encoding.text_encoder_folder import TextFolder, text_folder
from rdm_scale.errors import DataError

_CLASSES = {
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
_POSITIONS_AFTER_PADDING = (
    "camembert",
    "mpnet",
    "roberta",
    "xlm-roberta",
)  # the first entries of their table are unused
_DEFAULT_MAX_TOKENS = 512  # where neither the model nor its tokenizer has a limit, as of T5
_NO_LIMIT = 10**6  # tokenizers without a limit have one of 10^30


@dataclass(frozen=True)
class TextRecord:
    """What a manifest keeps of a text encoder."""

    name: str  # class of the model
    location: str
    digest: str  # sha256 of weights, tokenizer and pooling
    width: int  # D of the tokens [n, D]
    pooled_width: int  # P of the pooled vector [P]
    max_tokens: int


class TextEncoder:
    """A text encoder of transformers (BERT and its like, CLIP, T5) from a folder, local or on any fsspec file system.

    The folder is as save_pretrained writes it, with tokenizer.json, or as sentence-transformers does. The pooled
    vector is what the latter's pooling says; otherwise CLIP's projected or the model's own pooled output, or the mean
    of the tokens. No code, no pickled weights and nothing from the network is loaded.

    Args:
        max_tokens: longer captions are cut there; by default at what the model was made for.
        dtype: of the computation; results are float32.
        options: of the fsspec file system, beyond what it takes from the environment.

    Raises:
        DataError: no such folder, an encoder of another kind, damaged or missing weights, or max_tokens does not fit.
    """

    def __init__(
        self,
        url: str,
        device: str | torch.device = "cpu",
        *,
        max_tokens: int | None = None,
        batch_size: int = 32,
        dtype: Literal["float32", "bfloat16"] = "float32",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.truncated = 0  # captions that were cut so far
        self._device, self._batch_size = torch.device(device), batch_size
        with text_folder(url, options) as folder:
            self._pooling, self._unit_norm = folder.pooling, folder.unit_norm
            self._model, self._tokenizer = _load(folder)
            limits = _limits(folder, self._model, self._tokenizer)
        self._location, self._max_tokens = folder.location, max_tokens or min(limits)
        if max_tokens is not None and not 0 < max_tokens <= limits[0]:
            raise DataError(
                f"the text encoder {self._location} takes 1 to {limits[0]} tokens, not {max_tokens}: change max_tokens"
            )
        self._model.to(self._device, getattr(torch, dtype)).eval().requires_grad_(False)
        for parameter in self._model.parameters():
            # Out of the mapped file: where a tensor begins in it decides which instructions the CPU takes, and so the
            # last bit of results, and the file may be changed.
            parameter.data = parameter.data.clone()
        empty = self._first()
        self.record = TextRecord(
            type(self._model).__name__,
            self._location,
            folder.digest,
            empty.tokens.shape[1],
            len(empty.pooled),
            self._max_tokens,
        )

    def encode(self, captions: Sequence[str]) -> list[EncodedText]:
        """Vectors of captions, in their order; the same list gives the same bytes.

        What else is in the list changes a caption's vectors by no more than rounding. Captions that are cut are counted
        in `truncated`.

        Raises:
            DataError: a vector is not finite.
        """
        if not captions:
            return []
        ids = self._tokenize(list(captions))
        results: dict[int, EncodedText] = {}
        by_length = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))  # little padding
        for start in range(0, len(ids), self._batch_size):
            batch = by_length[start : start + self._batch_size]
            results.update(zip(batch, self._run([ids[i] for i in batch]), strict=True))
        for i, result in results.items():
            if not (result.tokens.isfinite().all() and result.pooled.isfinite().all()):
                raise DataError(
                    f"the text encoder {self._location} makes vectors of the caption {captions[i][:100]!r} that "
                    "are not finite: are its weights whole?"
                )
        return [results[i] for i in range(len(ids))]

    def _first(self) -> EncodedText:
        """The empty caption, which stands for a dropped one. Raises DataError: it has no tokens, or nothing works."""
        if not self._tokenizer([""])["input_ids"][0]:
            raise DataError(
                f"the tokenizer in {self._location} adds no special tokens, so that the empty caption, to which "
                "training drops captions, would have no tokens at all: use the tokenizer it was trained with"
            )
        try:
            return self.encode([""])[0]
        except DataError:
            raise
        except Exception as error:  # an untrusted configuration fails in many ways
            raise DataError(f"the text encoder {self._location} does not work: {_first_lines(error)}") from None

    def _tokenize(self, captions: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(captions, verbose=False)["input_ids"]
        cut = [i for i, one in enumerate(ids) if len(one) > self._max_tokens]
        if cut:  # special tokens at the end must stay: the tokenizer cuts before them
            short = self._tokenizer([captions[i] for i in cut], truncation=True, max_length=self._max_tokens)
            for i, one in zip(cut, short["input_ids"], strict=True):
                ids[i] = one
            self.truncated += len(cut)
        return ids

    @torch.no_grad()
    def _run(self, ids: Sequence[Sequence[int]]) -> Iterator[EncodedText]:
        lengths = [len(one) for one in ids]
        padded = torch.full((len(ids), max(lengths)), self._tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(padded)
        for row, one in enumerate(ids):
            padded[row, : len(one)] = torch.tensor(one)
            mask[row, : len(one)] = 1
        output = self._model(input_ids=padded.to(self._device), attention_mask=mask.to(self._device))
        hidden = output.last_hidden_state.to("cpu", torch.float32)
        own = getattr(output, "text_embeds", None)
        own = getattr(output, "pooler_output", None) if own is None else own
        for row, length in enumerate(lengths):
            tokens = hidden[row, :length].clone()  # a copy: the padding must not stay in memory
            if self._pooling is None and own is not None:
                yield EncodedText(tokens, own[row].to("cpu", torch.float32))
            else:
                pooled = {"cls": tokens[0], "max": tokens.amax(0)}.get(self._pooling or "mean", tokens.mean(0))
                yield EncodedText(tokens, F.normalize(pooled, dim=0) if self._unit_norm else pooled.clone())


def _load(folder: TextFolder) -> tuple[Any, Any]:
    """The model, float type as stored, and its tokenizer."""
    kind = folder.config.get("model_type")
    if kind not in _CLASSES:
        raise DataError(f"{folder.location} holds a {kind} model: the text encoders known are {', '.join(_CLASSES)}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the library is imported
    import transformers  # takes seconds

    try:
        with _quiet(transformers):
            shapes = _weight_shapes(folder)
            name = "CLIPTextModelWithProjection" if "text_projection.weight" in shapes else _CLASSES[kind]
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
        raise DataError(f"the files in {folder.location} do not make a text encoder: {_first_lines(error)}") from None
    return model, tokenizer


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without its reports of weights that are not used (the other half of a model) and its progress bars."""
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


def _weight_shapes(folder: TextFolder) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for path in folder.weights:
        with safe_open(path, "pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return shapes


def _check_parameters(model_class: Any, config: Any, chosen: dict[str, bool], shapes: dict[str, list[int]]) -> None:
    """Memory must be in proportion to the files of weights, however large the configuration says the model is."""
    with torch.device("meta"):
        expected = sum(parameter.numel() for parameter in model_class(config, **chosen).parameters())
    stored = sum(map(math.prod, shapes.values()))
    if expected > 2 * stored + 10**6:
        raise ValueError(f"the configuration is of {expected} parameters, and the weights hold {stored} numbers")


def _limits(folder: TextFolder, model: Any, tokenizer: Any) -> list[int]:
    """Numbers of tokens: first the most that the model can take at all, then what it was made for."""
    table = getattr(model.config, "max_position_embeddings", None) or _NO_LIMIT
    if folder.config["model_type"] in _POSITIONS_AFTER_PADDING:
        table -= model.config.pad_token_id + 1
    made_for = [
        value
        for value in (folder.max_tokens, tokenizer.model_max_length)
        if isinstance(value, int) and 0 < value < _NO_LIMIT
    ]
    return [table, *(made_for or [_DEFAULT_MAX_TOKENS])]


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).strip().splitlines()[:2]) or type(error).__name__


def encode_prompts(how: TextEncoding, prompts: Sequence[str], url: str | None = None) -> TextCondition:
    """Prompts as the captions of a set were encoded.

    Args:
        url: folder of the text encoder, where it is not where it was when the set was encoded.

    Raises:
        DataError: there is no such encoder, or it is another one.
    """
    encoder = TextEncoder(url or how.location, max_tokens=how.max_tokens)
    if encoder.record.digest != how.digest:
        raise DataError(
            f"{url or how.location} is not the text encoder that the model was trained with ({how.encoder} of digest "
            f"{how.digest[:12]}, this one has {encoder.record.digest[:12]}): name the folder of that one"
        )
    return TextCondition.from_captions(encoder.encode(prompts))
