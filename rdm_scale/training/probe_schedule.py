"""Steps in which the depth probe measures.

Blocks run eagerly in such a step, because compiled ones call no hooks. For deep stacks of small blocks that takes many
times as long as a compiled step. So the interval adapts there: a measurement is left out while all of them together
would take more than one percent of the run's time. It does not adapt where a run must repeat itself bit for bit, since
eager and compiled steps round differently: on CPUs, and with `train.deterministic`.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from rdm_scale.parallel.mesh import Mesh

MAX_SHARE = 0.01  # of the run's time


class ProbeSchedule:
    """Decides which steps are measured: multiples of `every` (0: none) and the first step of all.

    Args:
        adapts: leave measurements out while they would take too long. The first two of a process are always made: the
            first one also warms up, and its time says nothing.
        start: steps done before.
    """

    def __init__(
        self, every: int, adapts: bool, mesh: Mesh, start: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.every, self.adapts, self.mesh, self.clock, self.start = every, adapts, mesh, clock, start
        self._decided: dict[int, bool] = {}
        self._began = clock()
        self._durations_s: list[float] = []  # of measured steps

    def is_due(self, step: int) -> bool:
        """True if `step` is measured. Collective where the interval adapts and `step` is asked about first."""
        if not self.every or (step % self.every and step != 1):
            return False
        if step not in self._decided:
            self._decided[step] = step == 1 or not self.adapts or self.mesh.broadcast(self._affordable(step))
        return self._decided[step]

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Context of a measured step, which takes its time."""
        self._wait()
        began = self.clock()
        yield
        self._wait()
        self._durations_s.append(self.clock() - began)

    def _affordable(self, step: int) -> bool:
        """True if this and all earlier measurements, but the first, take at most their share beyond plain steps."""
        known, plain = self._durations_s[1:], step - 1 - self.start - len(self._durations_s)
        if not known or plain <= 0:  # where every step is measured there is nothing to compare with
            return True
        elapsed_s = self.clock() - self._began
        plain_s = (elapsed_s - sum(self._durations_s)) / plain
        return sum(known) + known[-1] - (len(known) + 1) * plain_s <= MAX_SHARE * elapsed_s

    def _wait(self) -> None:
        """Wait for the device, so that its time counts in the right step."""
        if self.adapts and self.mesh.device.type == "cuda":
            torch.cuda.synchronize()
