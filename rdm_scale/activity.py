"""Present activity of a rank: what a message about its failure says, and where the time of a step goes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Activity:
    """Step and phase that this rank is in.

    Attributes:
        phase: phrase that completes "during ...".
        step: step under way, or the last one outside of steps; None during the start-up.
        completed: steps completed; None during the start-up.
        checkpoint: step of the newest complete checkpoint, None if there is none.
        seconds: time spent in each phase since the last `take_seconds`.
    """

    phase: str = "the start-up"
    step: int | None = None
    completed: int | None = None
    checkpoint: int | None = None
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Note the phase, and the time spent in it; the phase stays where the body fails."""
        outer, began = self.phase, time.perf_counter()
        self.phase = phase
        yield
        self.phase = outer
        self.seconds[phase] += time.perf_counter() - began

    def take_seconds(self) -> dict[str, float]:
        """Seconds spent in each phase since the last call."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds

    def __str__(self) -> str:
        step = "" if self.step is None else f"step {self.step:,}, "
        return f"{step}during {self.phase}"
