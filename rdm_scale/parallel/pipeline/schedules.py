"""Pipeline schedules: in which order each rank runs the forwards and backwards of its chunks.

A model is cut into pipeline x chunks pieces ("chunks", numbered along the model). Under *loop* placement rank r holds
the chunks r, r + p, r + 2p, ...; under *V* placement the chunks r and 2p - 1 - r, so that first and last, second and
second to last, ... live together. A schedule is a list of operations for each rank. Nothing here knows of tensors.

    1f1b              loop, 1 chunk a rank: one forward, one backward in turn (PipeDream-Flush, arXiv 2006.09503);
                      bubble (p - 1) / (m + p - 1) for m micro-batches, rank r keeps p - r of them
    interleaved_1f1b  loop, v chunks a rank (Megatron-LM, arXiv 2104.04473): bubble (p - 1) / (v m + p - 1), more
                      messages, more activations kept
    v_1f1b            V, 2 chunks a rank: what belongs to the two ends of the model (long skips) never crosses the
                      network. Every rank keeps at most 3 p forwards of a chunk, as interleaving's first one does; the
                      bubble has no formula, lies between those of the other two for m about 2 p, and is simulated
"""

from collections.abc import Callable
from typing import NamedTuple

Costs = tuple[float, float]  # of one chunk's forward and of its backward
DEFAULT_COSTS: Costs = (1.0, 2.0)  # the backward computes two products for each of the forward


class Operation(NamedTuple):
    """Forward or backward of one chunk on one micro-batch."""

    backward: bool
    chunk: int
    micro_batch: int


class Placement(NamedTuple):
    """Which rank of the pipeline holds which chunk."""

    ranks: int
    chunks: int  # in all
    is_v: bool

    def mirror_of(self, chunk: int) -> int:
        """The chunk as far from the end as this one is from the beginning; under V both are on one rank."""
        return self.chunks - 1 - chunk

    def rank_of(self, chunk: int) -> int:
        if self.is_v and chunk >= self.ranks:
            return self.mirror_of(chunk)
        return chunk % self.ranks

    def chunks_of(self, rank: int) -> list[int]:
        return [chunk for chunk in range(self.chunks) if self.rank_of(chunk) == rank]


def placement(schedule: str, ranks: int, chunks_per_rank: int) -> Placement:
    return Placement(ranks, ranks * chunks_per_rank, schedule == "v_1f1b")


def operations(schedule: str, place: Placement, micro_batches: int) -> list[list[Operation]]:
    """Each rank's operations, in order. Interleaving needs micro_batches to be a multiple of the ranks."""
    if schedule == "v_1f1b":
        return _list_scheduled(place, micro_batches, in_flight=3 * place.ranks)
    if place.chunks > place.ranks and micro_batches % place.ranks:
        raise ValueError(f"{micro_batches} micro-batches are no multiple of {place.ranks} ranks")
    return [_one_forward_one_backward(place, rank, micro_batches) for rank in range(place.ranks)]


def _one_forward_one_backward(place: Placement, rank: int, micro_batches: int) -> list[Operation]:
    """Megatron's order: a group of `ranks` micro-batches goes through a rank's chunks in turn; warm-up forwards, then
    a forward and a backward in turn, then what backwards are left."""
    p, v = place.ranks, place.chunks // place.ranks
    count = v * micro_batches

    def nth(i: int, backward: bool) -> Operation:
        turn = i % (p * v) // p if v > 1 else 0
        chunk = (v - 1 - turn if backward else turn) * p + rank
        return Operation(backward, chunk, i // (p * v) * p + i % p if v > 1 else i)

    warm_up = min((p - rank - 1) * 2 + (v - 1) * p if v > 1 else p - rank - 1, count)
    order = [nth(i, False) for i in range(warm_up)]
    for i in range(count - warm_up):
        order += [nth(warm_up + i, False), nth(i, True)]
    return order + [nth(i, True) for i in range(count - warm_up, count)]


def _list_scheduled(place: Placement, micro_batches: int, in_flight: int) -> list[list[Operation]]:
    """Whenever a rank is idle it takes the oldest backward that is ready, else the forward of its deepest chunk that
    is, with at most `in_flight` forwards whose backward is still to come before it begins another micro-batch."""
    orders: list[list[Operation]] = [[] for _ in range(place.ranks)]
    waiting = [[Operation(b, c, 0) for c in place.chunks_of(r) for b in (True, False)] for r in range(place.ranks)]
    live, idle_from = [0] * place.ranks, [0] * place.ranks
    ends: dict[Operation, int] = {}
    never = 3 * 2 * place.chunks * micro_batches
    now = 0
    while any(waiting):
        for rank, candidates in enumerate(waiting):
            if idle_from[rank] > now:
                continue
            first = min(place.chunks_of(rank))
            ready = [
                o
                for o in candidates
                if all(ends.get(n, never) <= now for n in needs(o, place))
                and (o.backward or o.chunk != first or live[rank] < in_flight)
            ]
            if ready:
                operation = min(ready, key=lambda o: (not o.backward, o.backward and o.micro_batch, -o.chunk))
                orders[rank].append(operation)
                live[rank] += -1 if operation.backward else 1
                candidates.remove(operation)
                if operation.micro_batch + 1 < micro_batches:
                    candidates.append(operation._replace(micro_batch=operation.micro_batch + 1))
                idle_from[rank] = ends[operation] = now + (2 if operation.backward else 1)
        now += 1
    return orders


def needs(operation: Operation, place: Placement) -> list[Operation]:
    """What must have been done before an operation, on any rank."""
    backward, chunk, _ = operation
    if not backward:
        return [operation._replace(chunk=chunk - 1)] if chunk else []
    forward = operation._replace(backward=False)
    return [forward] if chunk == place.chunks - 1 else [forward, operation._replace(chunk=chunk + 1)]


class Simulation(NamedTuple):
    """A schedule carried out on paper."""

    bubble: float  # idle share of all ranks' time, from the first begin to the last end
    in_flight: list[int]  # per rank: most forwards that wait for their backward at any time


def simulate(
    orders: list[list[Operation]], place: Placement, costs: Callable[[int], Costs] = lambda chunk: DEFAULT_COSTS
) -> Simulation:
    """Runs a schedule with messages that take no time. Raises ValueError if it deadlocks."""
    ends: dict[Operation, float] = {}
    free, busy, position = [0.0] * place.ranks, 0.0, [0] * place.ranks
    while len(ends) < sum(map(len, orders)):
        before = len(ends)
        for rank, order in enumerate(orders):
            while position[rank] < len(order):
                operation = order[position[rank]]
                required = needs(operation, place)
                if not all(n in ends for n in required):
                    break
                took = costs(operation.chunk)[operation.backward]
                free[rank] = ends[operation] = max([free[rank], *(ends[n] for n in required)]) + took
                busy += took
                position[rank] += 1
        if len(ends) == before:
            raise ValueError("the schedule deadlocks")
    in_flight = []
    for order in orders:
        live = most = 0
        for operation in order:
            live += -1 if operation.backward else 1
            most = max(most, live)
        in_flight.append(most)
    return Simulation(1 - busy / (place.ranks * max(free)), in_flight)
