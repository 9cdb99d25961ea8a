"""Pipeline schedules: complete, free of deadlock, with the published bubbles and numbers of activations."""

from collections import Counter
from collections.abc import Callable

import pytest

from rdm_scale.parallel.pipeline.schedules import (
    BACKWARD,
    FORWARD,
    Action,
    ActionKind,
    ChunkCost,
    ChunkPlacement,
    build_schedule,
    dependencies,
    place_chunks,
    simulate,
)

SIZES = [(1, 1), (1, 5), (2, 1), (2, 2), (2, 5), (3, 9), (4, 7), (4, 8), (5, 3), (8, 16)]


def cases(schedule: str) -> list[tuple[str, int, int, int]]:
    chunks = {"1f1b": [1], "interleaved_1f1b": [2, 3], "v_1f1b": [2]}[schedule]
    return [
        (schedule, p, v, m)
        for p, m in SIZES
        for v in chunks
        if (schedule == "1f1b" or p > 1) and (schedule != "interleaved_1f1b" or m % p == 0)
    ]


ALL = [case for schedule in ("1f1b", "interleaved_1f1b", "v_1f1b") for case in cases(schedule)]


@pytest.mark.parametrize(("schedule", "p", "v", "m"), ALL)
def test_each_chunk_runs_each_micro_batch_forward_and_backward_once(schedule: str, p: int, v: int, m: int) -> None:
    place = place_chunks(schedule, p, v)
    schedule_of_ranks = build_schedule(schedule, place, m)
    done = Counter(action for actions in schedule_of_ranks for action in actions)
    assert done == {Action(kind, c, i): 1 for kind in ActionKind for c in range(p * v) for i in range(m)}
    for rank, actions in enumerate(schedule_of_ranks):
        assert {action.chunk for action in actions} == set(place.chunks_of(rank))
    simulate(schedule_of_ranks, place)  # raises if it deadlocks


@pytest.mark.parametrize(("schedule", "p", "v", "m"), cases("1f1b") + cases("interleaved_1f1b"))
def test_bubbles_are_those_of_the_papers(schedule: str, p: int, v: int, m: int) -> None:
    place = place_chunks(schedule, p, v)
    bubble = simulate(build_schedule(schedule, place, m), place).bubble
    assert bubble == pytest.approx((p - 1) / (v * m + p - 1))


@pytest.mark.parametrize(("p", "m"), [(p, m) for p, m in SIZES if m >= p])
def test_1f1b_keeps_as_many_micro_batches_as_stages_remain(p: int, m: int) -> None:
    place = place_chunks("1f1b", p, 1)
    assert simulate(build_schedule("1f1b", place, m), place).in_flight == [p - rank for rank in range(p)]


@pytest.mark.parametrize(("schedule", "p", "v", "m"), cases("v_1f1b"))
def test_v_keeps_at_most_three_forwards_for_each_rank(schedule: str, p: int, v: int, m: int) -> None:
    place = place_chunks(schedule, p, v)
    assert max(simulate(build_schedule(schedule, place, m), place).in_flight) <= 3 * p


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (4, 16), (8, 32)])
def test_the_bubble_of_v_is_between_those_of_the_other_schedules(p: int, m: int) -> None:
    bubbles = {}
    for schedule, v in (("1f1b", 1), ("v_1f1b", 2), ("interleaved_1f1b", 2)):
        place = place_chunks(schedule, p, v)
        bubbles[schedule] = simulate(build_schedule(schedule, place, m), place).bubble
    assert bubbles["interleaved_1f1b"] < bubbles["v_1f1b"] < bubbles["1f1b"]


def test_v_places_partners_on_one_rank() -> None:
    place = place_chunks("v_1f1b", 4, 2)
    assert [place.rank_of(chunk) for chunk in range(8)] == [0, 1, 2, 3, 3, 2, 1, 0]
    assert all(place.rank_of(k) == place.rank_of(7 - k) for k in range(8))
    assert place_chunks("interleaved_1f1b", 3, 2).chunks_of(1) == [1, 4]


def test_a_deadlock_is_reported() -> None:
    place = ChunkPlacement(2, 2, False)
    schedule = [[Action(BACKWARD, 0, 0), Action(FORWARD, 0, 0)], [Action(FORWARD, 1, 0), Action(BACKWARD, 1, 0)]]
    with pytest.raises(ValueError, match="deadlocks"):
        simulate(schedule, place)


def test_the_bubble_is_weighted_by_costs() -> None:
    """Two ranks and one micro-batch: nothing overlaps, so one of two is idle at any time, for any costs."""
    place = place_chunks("1f1b", 2, 1)
    costs: Callable[[int], ChunkCost] = lambda chunk: ChunkCost(1.0, 2.0) if chunk else ChunkCost(3.0, 5.0)  # noqa: E731
    assert simulate(build_schedule("1f1b", place, 1), place, costs).bubble == pytest.approx(0.5)


def test_dependencies_of_actions() -> None:
    place = place_chunks("1f1b", 3, 1)
    assert dependencies(Action(FORWARD, 0, 4), place) == []
    assert dependencies(Action(FORWARD, 2, 4), place) == [Action(FORWARD, 1, 4)]
    assert dependencies(Action(BACKWARD, 2, 4), place) == [Action(FORWARD, 2, 4)]
    assert dependencies(Action(BACKWARD, 1, 4), place) == [Action(FORWARD, 1, 4), Action(BACKWARD, 2, 4)]


def test_interleaving_refuses_an_incomplete_group_of_micro_batches() -> None:
    with pytest.raises(ValueError, match="3 micro-batches are no multiple of 2 ranks"):
        build_schedule("interleaved_1f1b", place_chunks("interleaved_1f1b", 2, 2), 3)
