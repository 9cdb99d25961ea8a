"""The prefetching thread: order, depth, exceptions and shutdown."""

import threading
import time
from collections.abc import Callable, Iterator
from itertools import count, islice

import pytest
import torch

from rdm_scale.batch import TrainingBatch
from rdm_scale.data.prefetch import Prefetcher
from rdm_scale.data.stream import LatentStream
from rdm_scale.errors import DataError
from tests.support.latent_sets import WriteSet
from tests.support.limits import HANG_S
from tests.support.training_batches import assert_training_batches_equal, drawn_batch, latent_batch


def batches() -> Iterator[TrainingBatch]:
    return (drawn_batch(latent_batch(range(i, i + 2))) for i in count())


def first(batch: TrainingBatch) -> int:
    return int(batch.positions[0])


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_batches_come_in_order_from_a_real_stream(write_set: WriteSet, depth: int) -> None:
    def source() -> Iterator[TrainingBatch]:
        return (drawn_batch(batch) for batch in LatentStream(latents.url, global_batch_size=4, seed=0))

    latents = write_set(29)
    with Prefetcher(source(), depth) as prefetcher:
        for found, expected in zip(islice(prefetcher, 20), source(), strict=False):
            assert_training_batches_equal(found, expected)


def test_it_reads_exactly_depth_batches_ahead() -> None:
    read = []
    with Prefetcher((read.append(first(batch)) or batch for batch in batches()), 3) as prefetcher:  # type: ignore[func-returns-value]
        for taken in range(4):
            wait_until(lambda expected=taken + 3: len(read) == expected)
            time.sleep(0.02)
            assert len(read) == taken + 3
            assert first(next(prefetcher)) == taken


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_an_iterator_that_ends_ends_the_prefetcher() -> None:
    with Prefetcher(islice(batches(), 5), 2) as prefetcher:
        assert [first(batch) for batch in prefetcher] == [0, 1, 2, 3, 4]
        assert list(prefetcher) == []


def test_an_error_is_raised_after_the_batches_before_it(write_set: WriteSet) -> None:
    """A shard is removed after the stream was opened."""
    latents = write_set(29)
    stream = LatentStream(latents.url, global_batch_size=4, seed=0)
    good = list(islice(stream, 3))
    stream = LatentStream(latents.url, global_batch_size=4, seed=0)
    (latents.folder / "shard-000001.tar").remove()
    with Prefetcher((drawn_batch(batch) for batch in stream), 8) as prefetcher:
        read = []
        with pytest.raises(DataError, match=r"shard-000001\.tar is missing"):
            for batch in prefetcher:
                read.append(batch.ids)
        assert all(torch.equal(ids, batch.ids) for ids, batch in zip(read, good, strict=False))
        with pytest.raises(DataError):  # again
            next(prefetcher)


def test_an_error_keeps_its_type_and_traceback() -> None:
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
