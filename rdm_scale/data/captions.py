"""Captions in side-car shards: packing, unpacking, and the encoded empty caption of a data set."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from rdm_scale.conditions import EncodedText, TextCondition
from rdm_scale.data.manifest import TextEncoding
from rdm_scale.data.shards import REMEDY
from rdm_scale.dtypes import STORED_DTYPES
from rdm_scale.errors import DataError
from rdm_scale.moved import moved_names


@dataclass(frozen=True, eq=False)
class CaptionMember:
    """Captions of the K samples of a member; the tokens of sample k are tokens[offsets[k]:offsets[k + 1]]."""

    tokens: Tensor  # [sum n, D]
    offsets: Tensor  # int64 [K + 1]
    pooled: Tensor  # [K, P]
    ids: Tensor  # int64 [K]


def pack_text(texts: Sequence[EncodedText], ids: Tensor, dtype: torch.dtype) -> bytes:
    """Pack the captions of K samples as a member of a side-car shard, in safetensors format.

    It contains `tokens` [sum n, D] and `text_pooled` [K, P] in `dtype`, `offsets` int64 [K + 1] into the tokens, and
    `ids` int64 [K].

    Raises:
        DataError: a value is not finite in `dtype`.
        ValueError: the ids are not int64 [K].
    """
    if ids.dtype != torch.int64 or ids.shape != (len(texts),):
        raise ValueError(f"ids must be int64 [{len(texts)}], one per caption, not {ids.dtype} {list(ids.shape)}")
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
) -> CaptionMember:
    """Unpack and check a member with K = `samples` captions that `pack_text` wrote.

    Args:
        where: description of the member for error messages.

    Raises:
        DataError: the content is not what `pack_text` writes.
    """
    try:
        tensors = safetensors.torch.load(content)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{where} is not a safetensors file ({error}): {REMEDY}") from None
    expected: dict[str, tuple[list[int], torch.dtype]] = {
        "tokens": ([-1, width], dtype),
        "text_pooled": ([samples, pooled_width], dtype),
        "offsets": ([samples + 1], torch.int64),
        "ids": ([samples], torch.int64),
    }
    if tensors.keys() != expected.keys():
        raise DataError(f"{where} holds {sorted(tensors)} instead of {sorted(expected)}: {REMEDY}")
    for name, (shape, stored_as) in expected.items():
        found = tensors[name]
        if found.dtype != stored_as or found.ndim != len(shape) or not _fits(found.shape, shape):
            raise DataError(
                f"{where} holds {name} {list(found.shape)} in {found.dtype}, expected {shape} in {stored_as}: {REMEDY}"
            )
    text = CaptionMember(tensors["tokens"], tensors["offsets"], tensors["text_pooled"], tensors["ids"])
    if text.offsets[0] != 0 or text.offsets[-1] != len(text.tokens) or (text.offsets.diff() < 0).any():
        raise DataError(
            f"{where} has offsets that do not divide {len(text.tokens)} tokens into {samples} captions: {REMEDY}"
        )
    if not (text.tokens.isfinite().all() and text.pooled.isfinite().all()):
        raise DataError(f"{where} contains values that are not finite: {REMEDY}")
    return text


def empty_caption(encoding: TextEncoding) -> TextCondition:
    """The encoded empty caption of a data set.

    Raises:
        DataError: it is damaged.
    """
    where = "the empty caption in the manifest"
    try:
        content = base64.b64decode(encoding.empty, validate=True)
    except ValueError as error:
        raise DataError(f"{where} is not base64 ({error}): {REMEDY}") from None
    text = unpack_text(content, 1, encoding.width, encoding.pooled_width, STORED_DTYPES[encoding.dtype].torch, where)
    return TextCondition.from_captions([EncodedText(text.tokens, text.pooled[0])])


def _fits(found: Sequence[int], expected: Sequence[int]) -> bool:
    return all(e in (-1, f) for f, e in zip(found, expected, strict=True))


__getattr__ = moved_names(__name__)
