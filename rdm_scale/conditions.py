"""What a model is conditioned on: nothing, classes, or text."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TextCondition(NamedTuple):
    """Encoded captions, padded to one length N."""

    tokens: Tensor  # [B, N, D], of any float type
    mask: Tensor  # bool [B, N]: True where there is a token; at least one a caption
    pooled: Tensor  # [B, P]

    @staticmethod
    def from_captions(captions: Sequence[tuple[Tensor, Tensor]]) -> "TextCondition":
        """Of captions (tokens [n, D], pooled [P]), in float32."""
        longest = max(len(tokens) for tokens, _ in captions)
        tokens = torch.stack([F.pad(t.float(), (0, 0, 0, longest - len(t))) for t, _ in captions])
        mask = torch.stack([torch.arange(longest) < len(t) for t, _ in captions])
        return TextCondition(tokens, mask, torch.stack([pooled.float() for _, pooled in captions]))

    def to(self, device: torch.device | str) -> "TextCondition":
        return TextCondition(*(part.to(device) for part in self))

    def pad_to(self, length: int) -> "TextCondition":
        more = length - self.tokens.shape[1]
        return TextCondition(F.pad(self.tokens, (0, 0, 0, more)), F.pad(self.mask, (0, more)), self.pooled)


def replace_captions(captions: TextCondition, which_B: Tensor, by: TextCondition) -> TextCondition:
    """Captions with some of them, bool [B], replaced by the one of `by`."""
    longest = max(captions.tokens.shape[1], by.tokens.shape[1])
    pairs = zip(captions.pad_to(longest), by.pad_to(longest), strict=True)
    return TextCondition(*(torch.where(which_B.view(-1, *[1] * (a.ndim - 1)), b, a) for a, b in pairs))


Condition = Tensor | TextCondition | None  # int64 labels [B], text, or nothing


def batch_size(condition: Tensor | TextCondition) -> int:
    return len(condition.pooled) if isinstance(condition, TextCondition) else len(condition)


def select_conditions(condition: Tensor | TextCondition, which: slice | Tensor) -> Tensor | TextCondition:
    """The conditions of some of the samples."""
    if isinstance(condition, TextCondition):
        return TextCondition(*(part[which] for part in condition))
    return condition[which]


def repeat_caption(condition: TextCondition, number: int) -> TextCondition:
    """One caption as that of so many samples."""
    return TextCondition(*(part.expand(number, *part.shape[1:]) for part in condition))


def concatenate_conditions(first: Tensor | TextCondition, second: Tensor | TextCondition) -> Tensor | TextCondition:
    """The conditions of two batches as those of one."""
    if isinstance(first, TextCondition) and isinstance(second, TextCondition):
        longest = max(first.tokens.shape[1], second.tokens.shape[1])
        pairs = zip(first.pad_to(longest), second.pad_to(longest), strict=True)
        return TextCondition(*(torch.cat(pair) for pair in pairs))
    assert isinstance(first, Tensor) and isinstance(second, Tensor)
    return torch.cat([first, second])
