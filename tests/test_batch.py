"""Batches: split in order, and moved as a unit."""

import dataclasses

import torch

from rdm_scale.batch import TrainingBatch
from rdm_scale.conditions import TextCondition
from tests.support.training_batches import drawn_batch, latent_batch


def test_a_batch_is_split_in_order() -> None:
    batch = drawn_batch(latent_batch(range(7)))
    parts = batch.split(3)
    assert [len(part) for part in parts] == [3, 3, 1] and {part.step for part in parts} == {4}
    for name in ("positions", "ids", "latents", "noise", "t", "condition"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))


def test_all_tensors_of_a_batch_are_moved() -> None:
    moved = drawn_batch(latent_batch(range(3))).to("meta")
    assert all(getattr(moved, n).is_meta for n in ("positions", "ids", "latents", "noise", "t", "condition"))


def test_tensors_make_the_same_batch_again() -> None:
    """With labels, and with captions, whose tensors are split and named one by one."""
    labels = drawn_batch(latent_batch(range(5)))
    captions = TextCondition(torch.randn(5, 3, 4), torch.rand(5, 3) < 0.5, torch.randn(5, 2))
    for batch in (labels, dataclasses.replace(labels, condition=captions, weights=torch.rand(5))):
        again = TrainingBatch.from_tensors(batch.step, batch.tensors())
        assert again.tensors().keys() == batch.tensors().keys() and again.step == batch.step
        assert all(torch.equal(again.tensors()[name], value) for name, value in batch.tensors().items())
        assert type(again.condition) is type(batch.condition)
        assert len(batch.split(2)) == 3 and type(batch.split(2)[2].condition) is type(batch.condition)
