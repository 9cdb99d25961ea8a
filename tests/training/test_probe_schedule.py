"""Steps that the depth probe measures."""

from typing import Any

import torch

from rdm_scale.training.probe_schedule import ProbeSchedule


class OneRank:
    device = torch.device("cpu")

    def broadcast(self, value: Any) -> Any:
        return value


def measured_steps(every: int, adapts: bool, step_s: float, measured_s: float, steps: int) -> list[int]:
    """Steps measured by a clock that steps of these durations move."""
    now = [0.0]
    schedule = ProbeSchedule(every, adapts, OneRank(), 0, lambda: now[0])  # type: ignore[arg-type]
    found = []
    for step in range(1, steps + 1):
        if schedule.is_due(step):
            found.append(step)
            with schedule.measured():
                now[0] += measured_s
        else:
            now[0] += step_s
        assert schedule.is_due(step) == (step in found)  # asked again, the answer is the same
    return found


def test_a_fixed_interval() -> None:
    assert measured_steps(3, False, 1.0, 1e6, 10) == [1, 3, 6, 9]
    assert measured_steps(0, False, 1.0, 1.0, 10) == []


def test_every_step() -> None:
    assert measured_steps(1, True, 1.0, 22.0, 5) == [1, 2, 3, 4, 5]


def test_cheap_measurements_keep_their_interval() -> None:
    assert measured_steps(100, True, 1.0, 1.5, 600) == [1, 100, 200, 300, 400, 500, 600]


def test_expensive_measurements_take_at_most_a_percent_of_the_time() -> None:
    """22 times as long as a step, as for a thousand narrow blocks."""
    found = measured_steps(100, True, 1.0, 22.0, 20_000)
    assert found[:3] == [1, 100, 4200]  # 21 s more than a step spent and 21 s to come, out of 4,241 s
    assert 21 * (len(found) - 1) <= 0.01 * 20_500
    assert len(found) >= 9
