"""Pipeline schedules: in which order each rank runs the forwards and backwards of its chunks.

A model is divided into p * v chunks, numbered along the model: v chunks on each of p ranks. Under *loop* placement
rank r holds chunks r, r + p, r + 2p, ...; under *V* placement chunks r and 2p - 1 - r, so that the first and the last
chunk, the second and the second to last, ... are on one rank. A schedule is a list of actions for each rank. Nothing
here knows of tensors.

    1f1b              loop, v = 1: one forward, one backward in turn (PipeDream-Flush, arXiv 2006.09503);
                      bubble (p - 1) / (m + p - 1) for m micro-batches, rank r keeps activations of p - r of them
    interleaved_1f1b  loop, v > 1 (Megatron-LM, arXiv 2104.04473): bubble (p - 1) / (v m + p - 1), more messages, more
                      activations
    v_1f1b            V, v = 2: tensors that pass between the two ends of the model (long skips) never cross the
                      network. Every rank keeps at most 3 p forwards of a chunk, as the first rank does under
                      interleaving; the bubble has no formula, is between those of the other two for m about 2 p, and
                      is simulated
"""

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple


class ActionKind(Enum):
    """Direction of an action."""

    FORWARD = "forward"
    BACKWARD = "backward"


FORWARD, BACKWARD = ActionKind.FORWARD, ActionKind.BACKWARD


class Action(NamedTuple):
    """Forward or backward of one chunk on one micro-batch."""

    kind: ActionKind
    chunk: int
    micro_batch: int


Schedule = list[list[Action]]  # of each rank of the pipeline, in order


class ChunkCost(NamedTuple):
    """Duration of a chunk's forward and backward, in any unit."""

    forward: float
    backward: float

    def of(self, kind: ActionKind) -> float:
        return self.forward if kind is FORWARD else self.backward


DEFAULT_COST = ChunkCost(1.0, 2.0)  # the backward computes two products for each of the forward


class ChunkPlacement(NamedTuple):
    """Assignment of chunks to the ranks of the pipeline."""

    ranks: int
    chunks: int  # in total
    is_v: bool

    @property
    def last_chunk(self) -> int:
        return self.chunks - 1

    def partner_of(self, chunk: int) -> int:
        """Chunk as far from the end as this one is from the beginning; under V placement both are on one rank."""
        return self.last_chunk - chunk

    def rank_of(self, chunk: int) -> int:
        if self.is_v and chunk >= self.ranks:
            return self.partner_of(chunk)
        return chunk % self.ranks

    def chunks_of(self, rank: int) -> list[int]:
        return [chunk for chunk in range(self.chunks) if self.rank_of(chunk) == rank]


def place_chunks(schedule: str, ranks: int, chunks_per_rank: int) -> ChunkPlacement:
    """Placement that a schedule (a value of `parallel.schedule`) uses."""
    return ChunkPlacement(ranks, ranks * chunks_per_rank, schedule == "v_1f1b")


def build_schedule(schedule: str, placement: ChunkPlacement, micro_batches: int) -> Schedule:
    """Actions of each rank.

    Raises:
        ValueError: interleaving, and `micro_batches` is not a multiple of the ranks.
    """
    if schedule == "v_1f1b":
        return _list_scheduled(placement, micro_batches, in_flight=3 * placement.ranks)
    if placement.chunks > placement.ranks and micro_batches % placement.ranks:
        raise ValueError(f"{micro_batches} micro-batches are no multiple of {placement.ranks} ranks")
    return [_one_forward_one_backward(placement, rank, micro_batches) for rank in range(placement.ranks)]


def _one_forward_one_backward(placement: ChunkPlacement, rank: int, micro_batches: int) -> list[Action]:
    """Megatron's order: a group of `ranks` micro-batches goes through a rank's chunks one after the other.

    Warm-up forwards, then a forward and a backward in turn, then the remaining backwards.
    """
    p, v = placement.ranks, placement.chunks // placement.ranks
    count = v * micro_batches

    def nth(i: int, kind: ActionKind) -> Action:
        """The rank's i-th forward or backward."""
        round_of_chunk = i % (p * v) // p if v > 1 else 0
        chunk = (v - 1 - round_of_chunk if kind is BACKWARD else round_of_chunk) * p + rank
        return Action(kind, chunk, i // (p * v) * p + i % p if v > 1 else i)

    warm_up = min((p - rank - 1) * 2 + (v - 1) * p if v > 1 else p - rank - 1, count)
    actions = [nth(i, FORWARD) for i in range(warm_up)]
    for i in range(count - warm_up):
        actions += [nth(warm_up + i, FORWARD), nth(i, BACKWARD)]
    return actions + [nth(i, BACKWARD) for i in range(count - warm_up, count)]


def _list_scheduled(placement: ChunkPlacement, micro_batches: int, in_flight: int) -> Schedule:
    """Greedy list scheduling with a bound on the activations in flight.

    An idle rank takes the oldest backward that is ready, else the forward of its deepest chunk that is, with at most
    `in_flight` forwards without their backward before it starts another micro-batch.
    """
    schedule: Schedule = [[] for _ in range(placement.ranks)]
    waiting = [
        [Action(kind, chunk, 0) for chunk in placement.chunks_of(rank) for kind in (BACKWARD, FORWARD)]
        for rank in range(placement.ranks)
    ]
    live, idle_from = [0] * placement.ranks, [0] * placement.ranks
    ends: dict[Action, int] = {}
    never = 3 * 2 * placement.chunks * micro_batches  # later than the end of any action
    now = 0
    while any(waiting):
        for rank, candidates in enumerate(waiting):
            if idle_from[rank] > now:
                continue
            first = min(placement.chunks_of(rank))
            ready = [
                action
                for action in candidates
                if all(ends.get(needed, never) <= now for needed in dependencies(action, placement))
                and (action.kind is BACKWARD or action.chunk != first or live[rank] < in_flight)
            ]
            if ready:
                action = min(ready, key=_priority)
                schedule[rank].append(action)
                live[rank] += 1 if action.kind is FORWARD else -1
                candidates.remove(action)
                if action.micro_batch + 1 < micro_batches:
                    candidates.append(action._replace(micro_batch=action.micro_batch + 1))
                idle_from[rank] = ends[action] = now + (1 if action.kind is FORWARD else 2)
        now += 1
    return schedule


def _priority(action: Action) -> tuple[int, int, int]:
    """Sort key of ready actions: backwards first, the oldest of them, then the deepest chunk."""
    if action.kind is BACKWARD:
        return 0, action.micro_batch, -action.chunk
    return 1, 0, -action.chunk


def dependencies(action: Action, placement: ChunkPlacement) -> list[Action]:
    """Actions, on any rank, that must be done before this one."""
    if action.kind is FORWARD:
        return [action._replace(chunk=action.chunk - 1)] if action.chunk else []
    forward = action._replace(kind=FORWARD)
    return [forward] if action.chunk == placement.last_chunk else [forward, action._replace(chunk=action.chunk + 1)]


class Simulation(NamedTuple):
    """Result of simulating a schedule."""

    bubble: float  # idle share of all ranks' time, from the first start to the last end
    in_flight: list[int]  # per rank: most forwards without their backward at any time


def simulate(
    schedule: Schedule, placement: ChunkPlacement, cost_of: Callable[[int], ChunkCost] = lambda chunk: DEFAULT_COST
) -> Simulation:
    """Run a schedule with messages that take no time.

    Args:
        cost_of: duration of the actions of a chunk.

    Raises:
        ValueError: the schedule deadlocks.
    """
    ends: dict[Action, float] = {}
    free, busy, position = [0.0] * placement.ranks, 0.0, [0] * placement.ranks
    while len(ends) < sum(map(len, schedule)):
        before = len(ends)
        for rank, actions in enumerate(schedule):
            while position[rank] < len(actions):
                action = actions[position[rank]]
                required = dependencies(action, placement)
                if not all(needed in ends for needed in required):
                    break
                duration = cost_of(action.chunk).of(action.kind)
                free[rank] = ends[action] = max([free[rank], *(ends[needed] for needed in required)]) + duration
                busy += duration
                position[rank] += 1
        if len(ends) == before:
            raise ValueError("the schedule deadlocks")
    return Simulation(1 - busy / (placement.ranks * max(free)), [_most_in_flight(actions) for actions in schedule])


def _most_in_flight(actions: list[Action]) -> int:
    live = most = 0
    for action in actions:
        live += 1 if action.kind is FORWARD else -1
        most = max(most, live)
    return most
