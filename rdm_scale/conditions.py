"""Conditions that a model takes: class labels, encoded captions, or none."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class EncodedText(NamedTuple):
    """One encoded caption: tokens [n, D], special tokens included and no padding, and a pooled vector [P]."""

    tokens: Tensor
    pooled: Tensor


class TextCondition(NamedTuple):
    """Encoded captions of a batch, padded to a common length N."""

    tokens: Tensor  # [B, N, D], any floating-point type
    mask: Tensor  # bool [B, N], True at tokens and False at padding; at least one token per caption
    pooled: Tensor  # [B, P]

    @staticmethod
    def from_captions(captions: Sequence[EncodedText]) -> "TextCondition":
        """Pad captions to the longest one and stack them, in float32."""
        longest = max(len(tokens) for tokens, _ in captions)
        tokens = torch.stack([F.pad(t.float(), (0, 0, 0, longest - len(t))) for t, _ in captions])
        mask = torch.stack([torch.arange(longest) < len(t) for t, _ in captions])
        return TextCondition(tokens, mask, torch.stack([pooled.float() for _, pooled in captions]))

    def to(self, device: torch.device | str) -> "TextCondition":
        return TextCondition(*(part.to(device) for part in self))

    def pad_to(self, length: int) -> "TextCondition":
        """Pad the captions to `length` tokens; `length` must be at least N."""
        padding = length - self.tokens.shape[1]
        return TextCondition(F.pad(self.tokens, (0, 0, 0, padding)), F.pad(self.mask, (0, padding)), self.pooled)


Condition = Tensor | TextCondition | None  # class labels int64 [B], captions, or no condition


def batch_size(condition: Tensor | TextCondition) -> int:
    """Number of samples B of a condition."""
    return len(condition.pooled) if isinstance(condition, TextCondition) else len(condition)


def replace_captions(captions: TextCondition, mask_B: Tensor, replacement: TextCondition) -> TextCondition:
    """Replace the captions where `mask_B` (bool [B]) is True by `replacement`, a TextCondition of one caption."""
    longest = max(captions.tokens.shape[1], replacement.tokens.shape[1])
    pairs = zip(captions.pad_to(longest), replacement.pad_to(longest), strict=True)
    return TextCondition(*(torch.where(mask_B.view(-1, *[1] * (old.ndim - 1)), new, old) for old, new in pairs))


def select_conditions(condition: Tensor | TextCondition, index: slice | Tensor) -> Tensor | TextCondition:
    """Index the conditions of a batch by a slice, by sample indices or by a boolean mask."""
    if isinstance(condition, TextCondition):
        return TextCondition(*(part[index] for part in condition))
    return condition[index]


def repeat_caption(caption: TextCondition, count: int) -> TextCondition:
    """Expand a TextCondition of one caption to `count` samples, without a copy."""
    return TextCondition(*(part.expand(count, *part.shape[1:]) for part in caption))


def concatenate_conditions(first: Tensor | TextCondition, second: Tensor | TextCondition) -> Tensor | TextCondition:
    """Concatenate the conditions of two batches; both are labels or both are captions."""
    if isinstance(first, TextCondition) and isinstance(second, TextCondition):
        longest = max(first.tokens.shape[1], second.tokens.shape[1])
        pairs = zip(first.pad_to(longest), second.pad_to(longest), strict=True)
        return TextCondition(*(torch.cat(pair) for pair in pairs))
    assert isinstance(first, Tensor) and isinstance(second, Tensor)
    return torch.cat([first, second])
