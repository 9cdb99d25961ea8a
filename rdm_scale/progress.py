"""Progress of long work: a bar on a terminal, a plain line every few seconds in a file or a pipe."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from types import TracebackType
from typing import NoReturn, Self, TextIO, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


class ProgressReporter:
    """Progress report of long work: the amount done, the rate, and the time left.

    On a terminal this is tqdm's bar. Elsewhere it is a line without carriage returns: the first after a second, then
    one every `interval_s`, and always one at the end. Rates are averages since the reporter was created.

    Args:
        title: what is being done, for instance "encoding".
        total: number of units; None if it is not known.
        unit: name of one unit of work, in the singular; "B" for bytes.
        initial: units done earlier, which do not count towards the rate.
        scaled: print large numbers with SI prefixes.
        shown: False on ranks that print nothing.
        stream: where to write (default: sys.stderr).
        interval_s: seconds between plain lines.
        clock: returns seconds; used for the plain lines only.
    """

    def __init__(
        self,
        title: str,
        total: int | None = None,
        unit: str = "sample",
        *,
        initial: int = 0,
        scaled: bool = False,
        shown: bool = True,
        stream: TextIO | None = None,
        interval_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.done = initial
        self._title, self._total, self._unit, self._scaled = title, total, unit, scaled
        self._initial, self._shown = initial, shown
        self._stream = sys.stderr if stream is None else stream
        self._bar: tqdm[NoReturn] | None = None
        if shown and self._stream.isatty():
            self._bar = tqdm(
                desc=title,
                total=total,
                unit=unit,
                unit_scale=scaled,
                initial=initial,
                file=self._stream,
                dynamic_ncols=True,
            )
        self._figures: dict[str, str] = {}
        self._clock, self._interval_s, self._started = clock, interval_s, clock()
        self._due = self._started + min(1.0, interval_s)
        self._reported: int | None = None

    def update(self, count: int = 1, **figures: str) -> None:
        """Count `count` more units as done. `figures` are shown beside the progress, for instance loss="0.12"."""
        self.done += count
        self._figures = figures or self._figures
        if self._bar is not None:
            if figures:
                self._bar.set_postfix(figures, refresh=False)
            self._bar.update(count)
        elif self._shown and self._clock() >= self._due:
            self._write()

    def advance_to(self, done: int, total: int | None = None) -> None:
        """Set the number of units done, which never decreases; `total` replaces the total."""
        if total is not None:
            self._total = total
            if self._bar is not None:
                self._bar.total = total
        if done > self.done:
            self.update(done - self.done)

    def close(self) -> None:
        """End the report; without a terminal, write the final state unless the last line had it."""
        if self._bar is not None:
            self._bar.close()
        elif self._shown and self.done and self.done != self._reported:
            self._write()
        self._shown, self._bar = False, None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _write(self) -> None:
        now = self._clock()
        print(self._line(now - self._started), file=self._stream, flush=True)
        self._due, self._reported = now + self._interval_s, self.done

    def _line(self, elapsed_s: float) -> str:
        """Text of one report: `drawing: 125/250 samples, 41.7 samples/s, 00:03 left`."""
        rate = (self.done - self._initial) / elapsed_s if elapsed_s > 0 else 0.0
        unit = self._unit if self._unit == "B" else f" {self._unit}s"
        total = "" if self._total is None else f"/{self._number(self._total)}"
        parts = [f"{self._title}: {self._number(self.done)}{total}{unit}"]
        if rate:
            parts.append(f"{self._number(rate)}{unit}/s")
        if self._total is not None and self.done >= self._total:
            parts.append(f"{tqdm.format_interval(elapsed_s)} in all")
        elif self._total is not None and rate:
            parts.append(f"{tqdm.format_interval((self._total - self.done) / rate)} left")
        return ", ".join(parts + [f"{name} {value}" for name, value in self._figures.items()])

    def _number(self, value: float) -> str:
        if self._scaled:
            return str(tqdm.format_sizeof(value))
        return f"{value:,}" if isinstance(value, int) else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def track(items: Iterable[Item], title: str, unit: str, total: int | None = None) -> Iterator[Item]:
    """Iterate over `items` and report the progress, one unit per item.

    Args:
        total: number of items; needed only if `items` has no length.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with ProgressReporter(title, total, unit) as progress:
        for item in items:
            yield item
            progress.update()
