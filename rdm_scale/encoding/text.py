"""Text encoders of captions and prompts, with models of transformers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from rdm_scale.conditions import TextCondition
from rdm_scale.data.captions import EncodedText
from rdm_scale.data.manifest import TextEncoding
from rdm_scale.dtypes import STORED_DTYPES
from rdm_scale.encoding.text_encoder_folder import text_encoder_folder
from rdm_scale.encoding.text_model import first_lines, load_text_model
from rdm_scale.errors import DataError


@dataclass(frozen=True)
class TextEncoderRecord:
    """Identity of a text encoder, as manifests keep it.

    Digests of jobs contain the names and values of all fields: renaming one would orphan the jobs of earlier
    versions.
    """

    name: str  # class of the model
    location: str
    digest: str  # sha256 of weights, tokenizer and pooling
    width: int  # D of the tokens [n, D]
    pooled_width: int  # P of the pooled vector [P]
    max_tokens: int


class TextEncoder:
    """A text encoder of transformers (BERT and similar, CLIP, T5) from a folder, local or on any fsspec file system.

    The folder is written by save_pretrained, with tokenizer.json, or by sentence-transformers. The pooled
    vector follows the pooling configuration of sentence-transformers; without one it is CLIP's projected output, the
    model's own pooled output, or else the mean of the tokens. No code, no pickled weights and nothing from the network
    is loaded.

    Args:
        max_tokens: longer captions are truncated; None: the length that the model was trained for.
        dtype: dtype of the computation; results are float32.
        options: options of the fsspec file system, beyond what it takes from the environment.

    Attributes:
        record: identity of the encoder.
        truncated: number of captions truncated so far.

    Raises:
        DataError: there is no such folder, the class of the encoder is not supported, weights are damaged or missing,
            or max_tokens does not fit the model.
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
        self.truncated = 0
        self._device, self._batch_size = torch.device(device), batch_size
        with text_encoder_folder(url, options) as folder:
            self._pooling, self._unit_norm = folder.pooling, folder.unit_norm
            loaded = load_text_model(folder)
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._location, self._max_tokens = folder.location, max_tokens or loaded.default_tokens
        if max_tokens is not None and not 0 < max_tokens <= loaded.most_tokens:
            raise DataError(
                f"the text encoder {self._location} takes 1 to {loaded.most_tokens} tokens, not {max_tokens}: "
                "change max_tokens"
            )
        self._model.to(self._device, STORED_DTYPES[dtype].torch).eval().requires_grad_(False)
        for parameter in self._model.parameters():
            # Copied out of the memory-mapped file, which may change, and where the alignment of a tensor determines
            # which instructions the CPU uses and so the last bit of results.
            parameter.data = parameter.data.clone()
        empty = self._encode_empty()
        self.record = TextEncoderRecord(
            type(self._model).__name__,
            self._location,
            folder.digest,
            empty.tokens.shape[1],
            len(empty.pooled),
            self._max_tokens,
        )

    def encode(self, captions: Sequence[str]) -> list[EncodedText]:
        """Encode captions, in their order; the same list gives the same bytes.

        In another list, the vectors of a caption may differ by rounding errors.

        Raises:
            DataError: a vector is not finite.
        """
        if not captions:
            return []
        ids = self._tokenize(list(captions))
        results: dict[int, EncodedText] = {}
        by_length = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))  # keeps padding short
        for start in range(0, len(ids), self._batch_size):
            batch = by_length[start : start + self._batch_size]
            results.update(zip(batch, self._run([ids[i] for i in batch]), strict=True))
        for i, result in results.items():
            if not (result.tokens.isfinite().all() and result.pooled.isfinite().all()):
                raise DataError(
                    f"the text encoder {self._location} encodes the caption {captions[i][:100]!r} to vectors that "
                    "are not finite: copy its weights again, or use another encoder"
                )
        return [results[i] for i in range(len(ids))]

    def _encode_empty(self) -> EncodedText:
        """Encode the empty caption, which replaces dropped ones; this also tests the model.

        Raises:
            DataError: the caption has no tokens, or the model fails.
        """
        if not self._tokenizer([""])["input_ids"][0]:
            raise DataError(
                f"the tokenizer in {self._location} adds no special tokens, so that the empty caption, which "
                "replaces captions dropped in training, would have no tokens: use the tokenizer it was trained with"
            )
        try:
            return self.encode([""])[0]
        except DataError:
            raise
        except Exception as error:  # an untrusted configuration fails in many ways
            raise DataError(f"the text encoder {self._location} does not work: {first_lines(error)}") from None

    def _tokenize(self, captions: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(captions, verbose=False)["input_ids"]
        too_long = [i for i, one in enumerate(ids) if len(one) > self._max_tokens]
        if too_long:  # truncated by the tokenizer, which keeps the special tokens at the end
            short = self._tokenizer([captions[i] for i in too_long], truncation=True, max_length=self._max_tokens)
            for i, one in zip(too_long, short["input_ids"], strict=True):
                ids[i] = one
            self.truncated += len(too_long)
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
            tokens = hidden[row, :length].clone()  # a copy, which does not keep the padding in memory
            if self._pooling is None and own is not None:
                yield EncodedText(tokens, own[row].to("cpu", torch.float32))
            else:
                pooled = {"cls": tokens[0], "max": tokens.amax(0)}.get(self._pooling or "mean", tokens.mean(0))
                yield EncodedText(tokens, F.normalize(pooled, dim=0) if self._unit_norm else pooled.clone())


def encode_prompts(encoding: TextEncoding, prompts: Sequence[str], url: str | None = None) -> TextCondition:
    """Encode prompts exactly as the captions of a data set were encoded.

    Args:
        encoding: text encoding of the data set.
        url: folder of the text encoder; None: its location when the data set was encoded.

    Raises:
        DataError: there is no such encoder, or it is a different one.
    """
    encoder = TextEncoder(url or encoding.location, max_tokens=encoding.max_tokens)
    if encoder.record.digest != encoding.digest:
        raise DataError(
            f"{url or encoding.location} is not the text encoder that the model was trained with ({encoding.encoder}, "
            f"digest {encoding.digest[:12]}, here {encoder.record.digest[:12]}): give the folder of that encoder"
        )
    return TextCondition.from_captions(encoder.encode(prompts))
