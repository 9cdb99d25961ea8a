"""Prefetching of training batches in a background thread."""

import threading
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from rdm_scale.batch import TrainingBatch
from rdm_scale.moved import moved_names


class Prefetcher:
    """Iterator of batches that runs in a thread, up to `depth` batches ahead of its consumer.

    An exception of the iterator is raised by `next()` after the batches that precede it.
    """

    def __init__(self, batches: Iterator[TrainingBatch], depth: int) -> None:
        self._depth = depth
        self._ready: deque[TrainingBatch] = deque()
        self._end: BaseException | None = None  # an exception of the iterator, or StopIteration
        self._closed = False
        self._changed = threading.Condition()
        # A daemon thread, so that a consumer that fails without closing does not keep the process alive.
        self._thread = threading.Thread(target=self._read, args=(batches,), name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TrainingBatch:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._end is not None)
            if not self._ready:
                assert self._end is not None
                raise self._end
            self._changed.notify_all()
            return self._ready.popleft()

    def close(self) -> None:
        """Stop the thread after its current batch, and drop the batches that were prefetched."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._end = self._end or StopIteration()
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _read(self, batches: Iterator[TrainingBatch]) -> None:
        end: BaseException = StopIteration()
        try:
            while self._has_room():
                batch = next(batches)
                with self._changed:
                    self._ready.append(batch)
                    self._changed.notify_all()
        except BaseException as error:
            end = error
        with self._changed:
            self._end = self._end or end
            self._changed.notify_all()

    def _has_room(self) -> bool:
        """Wait until there is room for another batch; False if the prefetcher was closed."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._ready) < self._depth or self._closed)
            return not self._closed


__getattr__ = moved_names(__name__)
