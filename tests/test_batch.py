"""Batches: split in order, and moved as a unit."""

import torch

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
