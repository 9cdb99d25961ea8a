"""Captions in side-car shards: packing, unpacking, and the encoded empty caption of a set."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from rdm_scale.conditions import TextCondition
from rdm_scale.data.manifest import TextEncoding
from rdm_scale.dtypes import STORED_DTYPES
from rdm_scale.errors import DataError
from rdm_scale.moved import moved_names


@dataclass(frozen=True, eq=False)
class EncodedText:
    """One caption: tokens float32 [n, D], its special ones too and no padding, and the whole as one vector [P]."""

    tokens: Tensor
    pooled: Tensor


@dataclass(frozen=True, eq=False)
class Text:
    """Captions of K samples: those of sample k are tokens[offsets[k]:offsets[k + 1]]."""

    tokens: Tensor  # [sum n, D]
    offsets: Tensor  # int64 [K + 1]
    pooled: Tensor  # [K, P]
    ids: Tensor  # int64 [K]


def pack_text(texts: Sequence[EncodedText], ids: Tensor, dtype: torch.dtype) -> bytes:
    """A member of a side-car shard: safetensors with the captions of K samples.

    `tokens` [sum n, D] and `text_pooled` [K, P] in `dtype`, `offsets` int64 [K + 1] into the tokens, `ids` int64 [K].

    Raises:
        DataError: a number is not finite in `dtype`.
    """
    if ids.dtype != torch.int64 or ids.shape != (len(texts),):
        raise ValueError(f"ids must be int64 [{len(texts)}], one a caption, not {ids.dtype} {list(ids.shape)}")
    lengths = torch.tensor([0, *(len(text.tokens) for text in texts)])
    tensors = {
        "tokens": torch.cat([text.tokens for text in texts]).to(dtype),
        "text_pooled": torch.stack([text.pooled for text in texts]).to(dtype),
    }
    for name, values in tensors.items():
        if not values.isfinite().all():
            raise DataError(f"the {name} of a caption are not finite in {dtype}: encode captions in a wider dtype")
    return safetensors.torch.save(tensors | {"offsets": lengths.cumsum(0), "ids": ids.contiguous()})


def unpack_text(
    content: bytes, samples: int, width: int, pooled_width: int, dtype: torch.dtype, where: str = "the captions' member"
) -> Text:
    """What `pack_text` packed, for K = samples. Raises DataError: it is anything else; the message holds `where`."""
    try:
        tensors = safetensors.torch.load(content)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{where} is not a safetensors file ({error}): {_REMEDY}") from None
    expected: dict[str, tuple[list[int], torch.dtype]] = {
        "tokens": ([-1, width], dtype),
        "text_pooled": ([samples, pooled_width], dtype),
        "offsets": ([samples + 1], torch.int64),
        "ids": ([samples], torch.int64),
    }
    if tensors.keys() != expected.keys():
        raise DataError(f"{where} holds {sorted(tensors)} instead of {sorted(expected)}: {_REMEDY}")
    for name, (shape, kind) in expected.items():
        found = tensors[name]
        if found.dtype != kind or found.ndim != len(shape) or not _fits(found.shape, shape):
            raise DataError(
                f"{where} holds {name} {list(found.shape)} in {found.dtype}, expected {shape} in {kind}: {_REMEDY}"
            )
    text = Text(tensors["tokens"], tensors["offsets"], tensors["text_pooled"], tensors["ids"])
    if text.offsets[0] != 0 or text.offsets[-1] != len(text.tokens) or (text.offsets.diff() < 0).any():
        raise DataError(f"{where} has offsets that do not cut {len(text.tokens)} tokens into {samples}: {_REMEDY}")
    if not (text.tokens.isfinite().all() and text.pooled.isfinite().all()):
        raise DataError(f"{where} holds numbers that are not finite: {_REMEDY}")
    return text


def empty_caption(how: TextEncoding) -> TextCondition:
    """The encoded empty caption of a set. Raises DataError: it is damaged."""
    where = "the empty caption in the manifest"
    try:
        content = base64.b64decode(how.empty, validate=True)
    except ValueError as error:
        raise DataError(f"{where} is not base64 ({error}): {_REMEDY}") from None
    text = unpack_text(content, 1, how.width, how.pooled_width, STORED_DTYPES[how.dtype].torch, where)
    return TextCondition.from_captions([(text.tokens, text.pooled[0])])


_REMEDY = "copy the shards and their manifest again from where they came from, or encode the data again"


def _fits(found: Sequence[int], expected: Sequence[int]) -> bool:
    return all(e in (-1, f) for f, e in zip(found, expected, strict=True))


__getattr__ = moved_names(__name__)
