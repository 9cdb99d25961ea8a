"""Conditions: padding, replacement, selection, repetition and concatenation."""

import torch

from rdm_scale.conditions import (
    EncodedText,
    TextCondition,
    batch_size,
    concatenate_conditions,
    repeat_caption,
    replace_captions,
    select_conditions,
)


def caption(length: int) -> TextCondition:
    """One caption of a length, whose tokens are that number."""
    return TextCondition.from_captions([EncodedText(torch.full((length, 2), float(length)), torch.zeros(3))])


def test_captions_of_different_lengths_are_concatenated_and_replaced() -> None:
    one, two = caption(1), caption(3)
    both = concatenate_conditions(one, two)
    assert isinstance(both, TextCondition) and batch_size(both) == 2
    assert both.mask.tolist() == [[True, False, False], [True, True, True]]
    assert both.tokens[:, :, 0].tolist() == [[1, 0, 0], [3, 3, 3]]
    assert replace_captions(two, torch.tensor([True]), one).mask.tolist() == [[True, False, False]]
    assert replace_captions(one, torch.tensor([False]), two).mask.tolist() == [[True, False, False]]


def test_labels_and_captions_are_selected_alike() -> None:
    labels, index = torch.tensor([5, 6, 7]), torch.tensor([2, 0])
    assert select_conditions(labels, index).tolist() == [7, 5]
    assert concatenate_conditions(labels, labels[:1]).tolist() == [5, 6, 7, 5]
    three = repeat_caption(caption(2), 3)
    selected = select_conditions(three, slice(1, 3))
    assert isinstance(selected, TextCondition) and batch_size(three) == 3
    assert batch_size(selected) == 2 and selected.tokens.shape == (2, 2, 2)
