"""Keyed draws, and the thread that makes them ahead of the step."""

import threading
import time
from collections.abc import Iterator
from itertools import count, islice

import pytest
import torch

from rdm_scale import rng
from rdm_scale.batch import LatentBatch, TrainingBatch
from rdm_scale.config import DiffusionConfig
from rdm_scale.data.prefetch import Prefetcher
from rdm_scale.data.stream import LatentStream
from rdm_scale.diffusion import Objective, build_objective
from rdm_scale.diffusion.training_draws import draw
from rdm_scale.errors import DataError
from tests.support.latent_sets import WriteSet

FLOW = build_objective(DiffusionConfig(), False)
DDPM = build_objective(DiffusionConfig(objective="ddpm"), False)


def latent_batch(positions: range, labels: torch.Tensor | None = None) -> LatentBatch:
    size = len(positions)
    return LatentBatch(
        step=4,
        positions=torch.tensor(positions),
        ids=torch.tensor(positions) + 1000,
        labels=torch.zeros(size, dtype=torch.int64) if labels is None else labels,
        latents=torch.ones(size, 2, 1, 3, 4),
    )


def drawn(batch: LatentBatch, seed: int = 1, purpose: str = "train", objective: Objective = FLOW) -> TrainingBatch:
    return draw(batch, objective=objective, seed=seed, num_classes=10, condition_dropout=0.3, purpose=purpose)


def assert_equal(one: TrainingBatch, other: TrainingBatch) -> None:
    assert one.step == other.step
    for name in ("positions", "ids", "latents", "noise", "t", "condition"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


# Draws


def test_draws_have_the_shapes_and_types_of_training() -> None:
    batch = drawn(latent_batch(range(5)))
    assert batch.noise.shape == batch.latents.shape == (5, 2, 1, 3, 4) and batch.noise.dtype == torch.float32
    assert batch.t.shape == (5,) and batch.t.dtype == torch.float32
    assert batch.condition is not None and batch.condition.dtype == torch.int64
    assert (batch.step, len(batch)) == (4, 5)


@pytest.mark.parametrize("objective", [FLOW, DDPM])
def test_draws_are_functions_of_the_position_and_of_nothing_else(objective: Objective) -> None:
    whole = drawn(latent_batch(range(100, 112)), objective=objective)
    parts = [drawn(latent_batch(range(p, p + 4)), objective=objective) for p in (108, 100, 104)]
    for start, part in zip((8, 0, 4), parts, strict=True):
        assert_equal(part, whole.split(4)[start // 4])


def test_each_number_comes_from_its_own_key() -> None:
    batch = drawn(latent_batch(range(64)), seed=7)
    for i, position in enumerate(range(64)):
        noise = torch.randn(2, 1, 3, 4, generator=rng.generator(7, "train noise", position))
        t = torch.rand((), generator=rng.generator(7, "train timestep", position))
        dropped = torch.rand((), generator=rng.generator(7, "train condition dropout", position)) < 0.3
        assert torch.equal(batch.noise[i], noise) and batch.t[i] == t
        assert batch.condition is not None and batch.condition[i] == (10 if dropped else 0)


@pytest.mark.parametrize("changes", [{"seed": 2}, {"purpose": "validation"}])
def test_seeds_and_purposes_draw_apart(changes: dict[str, object]) -> None:
    one, other = drawn(latent_batch(range(8))), drawn(latent_batch(range(8)), **changes)  # type: ignore[arg-type]
    assert not torch.isclose(one.noise, other.noise).any() and not torch.isclose(one.t, other.t).any()


def test_noise_is_standard_normal_over_samples_and_t_uniform() -> None:
    """2,000 samples of 24 elements; bounds are 4 standard errors (uniform t: mean 1/2, variance 1/12)."""
    batch = drawn(latent_batch(range(2000)))
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
    assert torch.equal(batch.noise, drawn(latent_batch(range(8))).noise)


def test_an_unknown_label_is_refused() -> None:
    with pytest.raises(DataError, match=r"id 1002 has label 10, and model\.num_classes=10"):
        drawn(latent_batch(range(4), torch.tensor([-1, 9, 10, 0])))


def test_a_batch_is_split_in_order() -> None:
    batch = drawn(latent_batch(range(7)))
    parts = batch.split(3)
    assert [len(part) for part in parts] == [3, 3, 1] and {part.step for part in parts} == {4}
    for name in ("positions", "ids", "latents", "noise", "t", "condition"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))


def test_a_batch_moves_as_a_whole() -> None:
    moved = drawn(latent_batch(range(3))).to("meta")
    assert all(getattr(moved, n).is_meta for n in ("positions", "ids", "latents", "noise", "t", "condition"))


# The thread


def batches() -> Iterator[TrainingBatch]:
    return (drawn(latent_batch(range(i, i + 2))) for i in count())


def first(batch: TrainingBatch) -> int:
    return int(batch.positions[0])


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_batches_come_in_order_from_a_real_stream(write_set: WriteSet, depth: int) -> None:
    def source() -> Iterator[TrainingBatch]:
        return (drawn(batch) for batch in LatentStream(latents.url, global_batch_size=4, seed=0))

    latents = write_set(29)
    with Prefetcher(source(), depth) as prefetcher:
        for found, expected in zip(islice(prefetcher, 20), source(), strict=False):
            assert_equal(found, expected)


def test_it_reads_ahead_so_far_and_no_farther() -> None:
    read = []
    with Prefetcher((read.append(first(batch)) or batch for batch in batches()), 3) as prefetcher:  # type: ignore[func-returns-value]
        for taken in range(4):
            wait_until(lambda expected=taken + 3: len(read) == expected)
            time.sleep(0.02)
            assert len(read) == taken + 3
            assert first(next(prefetcher)) == taken


def wait_until(condition) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_an_iterator_that_ends_ends_the_prefetcher() -> None:
    with Prefetcher(islice(batches(), 5), 2) as prefetcher:
        assert [first(batch) for batch in prefetcher] == [0, 1, 2, 3, 4]
        assert list(prefetcher) == []


def test_an_error_arrives_after_the_batches_before_it(write_set: WriteSet) -> None:
    """A real one: a shard damaged under the stream."""
    latents = write_set(29)
    stream = LatentStream(latents.url, global_batch_size=4, seed=0)
    good = list(islice(stream, 3))
    stream = LatentStream(latents.url, global_batch_size=4, seed=0)
    (latents.folder / "shard-000001.tar").remove()
    with Prefetcher((drawn(batch) for batch in stream), 8) as prefetcher:
        read = []
        with pytest.raises(DataError, match=r"shard-000001\.tar is missing"):
            for batch in prefetcher:
                read.append(batch.ids)
        assert all(torch.equal(ids, batch.ids) for ids, batch in zip(read, good, strict=False))
        with pytest.raises(DataError):  # and it stays
            next(prefetcher)


def test_an_error_keeps_its_type_and_place() -> None:
    def failing() -> Iterator[TrainingBatch]:
        yield next(batches())
        raise ZeroDivisionError("of the reader")

    with Prefetcher(failing(), 2) as prefetcher:
        next(prefetcher)
        with pytest.raises(ZeroDivisionError, match="of the reader") as raised:
            next(prefetcher)
    assert raised.traceback[-1].name == "failing"


def test_closing_ends_a_thread_that_waits_for_room() -> None:
    prefetcher = Prefetcher(batches(), 1)
    next(prefetcher)
    prefetcher.close()
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())
    assert list(prefetcher) == []
    prefetcher.close()


def test_a_consumer_that_fails_ends_the_thread() -> None:
    with pytest.raises(RuntimeError, match="in the step"), Prefetcher(batches(), 2) as prefetcher:
        next(prefetcher)
        raise RuntimeError("in the step")
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())
