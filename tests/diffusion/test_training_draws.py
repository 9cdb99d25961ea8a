"""Keyed draws: timestep, noise and condition dropout are functions of seed, purpose and position alone."""

import pytest
import torch

from rdm_scale import rng
from rdm_scale.batch import TrainingBatch
from rdm_scale.conditions import TextCondition
from rdm_scale.data.captions import empty_caption
from rdm_scale.data.manifest import read_manifest
from rdm_scale.data.stream import LatentStream
from rdm_scale.diffusion import Objective
from rdm_scale.diffusion.training_draws import draw
from rdm_scale.errors import DataError
from tests.support.small_runs import caption_of
from tests.support.training_batches import DDPM, FLOW, assert_training_batches_equal, drawn_batch, latent_batch


def test_draws_have_the_shapes_and_types_of_training() -> None:
    batch = drawn_batch(latent_batch(range(5)))
    assert batch.noise.shape == batch.latents.shape == (5, 2, 1, 3, 4) and batch.noise.dtype == torch.float32
    assert batch.t.shape == (5,) and batch.t.dtype == torch.float32
    assert batch.condition is not None and batch.condition.dtype == torch.int64
    assert (batch.step, len(batch)) == (4, 5)


@pytest.mark.parametrize("objective", [FLOW, DDPM])
def test_draws_are_functions_of_the_position_and_of_nothing_else(objective: Objective) -> None:
    whole = drawn_batch(latent_batch(range(100, 112)), objective=objective)
    parts = [drawn_batch(latent_batch(range(p, p + 4)), objective=objective) for p in (108, 100, 104)]
    for start, part in zip((8, 0, 4), parts, strict=True):
        assert_training_batches_equal(part, whole.split(4)[start // 4])


def test_each_number_comes_from_its_own_key() -> None:
    batch = drawn_batch(latent_batch(range(64)), seed=7)
    for i, position in enumerate(range(64)):
        noise = torch.randn(2, 1, 3, 4, generator=rng.generator(7, "train noise", position))
        t = torch.rand((), generator=rng.generator(7, "train timestep", position))
        dropped = torch.rand((), generator=rng.generator(7, "train condition dropout", position)) < 0.3
        assert torch.equal(batch.noise[i], noise) and batch.t[i] == t
        assert batch.condition is not None and batch.condition[i] == (10 if dropped else 0)


@pytest.mark.parametrize("changes", [{"seed": 2}, {"purpose": "validation"}])
def test_seeds_and_purposes_draw_apart(changes: dict[str, object]) -> None:
    one, other = drawn_batch(latent_batch(range(8))), drawn_batch(latent_batch(range(8)), **changes)  # type: ignore[arg-type]
    assert not torch.isclose(one.noise, other.noise).any() and not torch.isclose(one.t, other.t).any()


def test_noise_is_standard_normal_over_samples_and_t_uniform() -> None:
    """2,000 samples of 24 elements; bounds are 4 standard errors (uniform t: mean 1/2, variance 1/12)."""
    batch = drawn_batch(latent_batch(range(2000)))
    elements = batch.noise.numel()
    assert abs(batch.noise.mean()) < 4 / elements**0.5
    assert abs(batch.noise.var() - 1) < 4 * (2 / elements) ** 0.5
    neighbours = (batch.noise[1:] * batch.noise[:-1]).mean()
    assert abs(neighbours) < 4 / elements**0.5
    assert abs(batch.t.mean() - 0.5) < 4 * (1 / 12 / 2000) ** 0.5


@pytest.mark.parametrize("dropout", [0.0, 0.1, 1.0])
def test_labels_are_dropped_with_the_given_probability(dropout: float) -> None:
    labels = torch.arange(4000) % 5 - 1
    options = {"objective": FLOW, "seed": 3, "num_classes": 4, "condition_dropout": dropout}
    condition = draw(latent_batch(range(4000), labels), **options).condition  # type: ignore[arg-type]
    assert condition is not None
    known = labels >= 0
    assert (condition[~known] == 4).all()
    dropped = condition[known] == 4
    assert torch.equal(condition[known][~dropped], labels[known][~dropped])
    assert abs(dropped.double().mean() - dropout) <= 4 * (dropout * (1 - dropout) / known.sum()) ** 0.5


def test_without_classes_there_is_no_condition_and_labels_do_not_matter() -> None:
    options = {"objective": FLOW, "seed": 1, "condition_dropout": 0.3}
    batch = draw(latent_batch(range(8), torch.full((8,), 99)), num_classes=None, **options)  # type: ignore[arg-type]
    assert batch.condition is None and all(part.condition is None for part in batch.to("cpu").split(3))
    assert torch.equal(batch.noise, drawn_batch(latent_batch(range(8))).noise)


def test_an_unknown_label_is_refused() -> None:
    with pytest.raises(DataError, match=r"id 1002 has label 10, and model\.num_classes=10"):
        drawn_batch(latent_batch(range(4), torch.tensor([-1, 9, 10, 0])))


def test_dropped_captions_become_the_empty_one(captioned: str) -> None:
    encoding = read_manifest(captioned).manifest.text
    assert encoding is not None
    empty = empty_caption(encoding)
    batch = LatentStream(captioned, global_batch_size=48, seed=1, captions=True).batch(1)

    def drawn(dropout: float) -> TrainingBatch:
        return draw(batch, objective=FLOW, seed=3, num_classes=None, condition_dropout=dropout, empty_caption=empty)

    none, some, every = (drawn(dropout).condition for dropout in (0.0, 0.3, 1.0))
    assert all(isinstance(text, TextCondition) for text in (none, some, every))
    tokens, pooled = caption_of(0)
    assert torch.equal(every.pooled, pooled.expand(48, 5)) and every.mask.sum() == 48
    assert torch.equal(none.pooled, batch.text.pooled) and torch.equal(none.tokens, batch.text.tokens)
    dropped = (some.pooled == pooled).all(1)
    assert 5 < dropped.sum() < 25
    assert torch.equal(some.tokens[dropped, :1], tokens.expand(int(dropped.sum()), 1, 6))
    assert (some.mask[dropped].sum(1) == 1).all() and torch.equal(some.mask[~dropped], none.mask[~dropped])
    parts = drawn(0.3).split(20)
    assert [len(part) for part in parts] == [20, 20, 8]
    assert torch.equal(parts[1].condition.tokens, some.tokens[20:40])
