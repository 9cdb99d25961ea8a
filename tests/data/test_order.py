"""The global order: exactly once an epoch, for every number of ranks, from any step, and well mixed."""

from itertools import chain, islice

import numpy as np
import pytest

from rdm_scale.codecs.record import CodecRecord
from rdm_scale.data.manifest import Manifest, Shard, TarMember
from rdm_scale.data.order import GlobalOrder, Place, Run, permutation

# (samples of each member, by shard; C): even; uneven; C does not divide N; C > N; one sample; one stream; ...
CASES = [
    ([[4, 4, 4], [4, 4, 4]], 8),
    ([[5, 1, 7], [3], [2, 2, 9]], 4),
    ([[5, 1, 7], [3], [2, 2, 9]], 6),
    ([[5, 1, 7], [3], [2, 2, 8]], 28),
    ([[3, 2], [1, 1]], 20),
    ([[1]], 4),
    ([[3, 3], [1]], 1),
    ([[64] * 5, [64] * 3, [64, 17]], 96),
    ([[5, 1, 7] * 40, [3, 3] * 50, [2]], 24),  # runs of several members
]


def manifest_of(counts: list[list[int]]) -> Manifest:
    """A manifest with nothing on disk: order knows counts only."""

    def shard(number: int, samples: list[int]) -> Shard:
        members = tuple(
            TarMember(name=f"{m}", offset=1024 * m + 512, bytes=512, samples=n, xxh3="0" * 16)
            for m, n in enumerate(samples)
        )
        size, name = 1024 * (len(samples) + 1), f"shard-{number:06d}.tar"
        return Shard(name=name, samples=sum(samples), bytes=size, sha256="0" * 64, members=members)

    return Manifest(
        kind="mode",
        dtype="float16",
        shape=(1, 1, 1, 1),
        codec=CodecRecord(name="identity", location="identity"),
        samples=sum(map(sum, counts)),
        shards=tuple(shard(i, samples) for i, samples in enumerate(counts)),
    )


def every_place(counts: list[list[int]]) -> list[Place]:
    return [Place(s, m, sample) for s, shard in enumerate(counts) for m, n in enumerate(shard) for sample in range(n)]


@pytest.mark.parametrize(("counts", "streams"), CASES)
def test_every_sample_once_an_epoch_with_tails_carried_over(counts: list[list[int]], streams: int) -> None:
    order, places = GlobalOrder(manifest_of(counts), seed=3, streams=streams), every_place(counts)
    N, epochs = len(places), 4
    steps = -(-epochs * N // streams)
    walked = list(chain.from_iterable(order.places(order.positions(step)) for step in range(1, steps + 1)))
    read = [walked[e * N : (e + 1) * N] for e in range(epochs)]
    for epoch in read:
        assert sorted(epoch) == places
    if N > 12:
        assert len({tuple(epoch) for epoch in read}) == epochs


@pytest.mark.parametrize(("counts", "streams"), CASES)
def test_ranks_share_each_step_without_changing_it(counts: list[list[int]], streams: int) -> None:
    order = GlobalOrder(manifest_of(counts), seed=3, streams=streams)
    for step in (1, 2, 7, 100_000):
        whole = list(order.positions(step))
        assert whole == [(step - 1) * streams + c for c in range(streams)]
        for dp in (size for size in (1, 2, 4) if streams % size == 0):
            shares = [order.positions(step, rank, dp) for rank in range(dp)]
            assert {len(share) for share in shares} == {streams // dp} and [*chain(*shares)] == whole


def test_any_step_is_the_same_whether_walked_to_or_not() -> None:
    manifest = manifest_of([[5, 1, 7], [3], [2, 2, 9]])
    walker = GlobalOrder(manifest, seed=3, streams=4)
    walked = [walker.places(walker.positions(step)) for step in range(1, 60)]
    for step in (59, 1, 30, 8, 7):
        fresh = GlobalOrder(manifest, seed=3, streams=4)
        assert fresh.places(fresh.positions(step)) == walked[step - 1] == walker.places(walker.positions(step))


def test_a_far_step_makes_only_the_tables_of_its_own_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where permutations are made, since a walk to step 100,000 would make hundreds of thousands."""
    made = []
    monkeypatch.setattr("rdm_scale.data.order.permutation", lambda *args: (made.append(args), permutation(*args))[1])
    counts = [[8] * 20] * 5
    for step in (1, 100_000):
        made.clear()
        order = GlobalOrder(manifest_of(counts), seed=0, streams=16)
        order.places(order.positions(step))
        assert sum(size == 100 for _, size in made) <= 2 and len(made) <= 2 + 16


def test_seeds_and_epochs_give_unrelated_orders() -> None:
    counts = [[8] * 25] * 5
    orders = [
        list(islice(chain.from_iterable(order.places(order.positions(s)) for s in range(1, 21)), 1000))
        for order in (GlobalOrder(manifest_of(counts), seed=seed, streams=100) for seed in (0, 1))
    ]
    orders = [*orders, orders[0]]
    other = GlobalOrder(manifest_of(counts), seed=0, streams=100)
    orders[2] = list(chain.from_iterable(other.places(other.positions(s)) for s in range(11, 21)))
    index = {place: i for i, place in enumerate(every_place(counts))}
    ranks = np.array([[index[place] for place in order] for order in orders])
    correlations = np.corrcoef(ranks)[np.triu_indices(3, 1)]
    # four standard deviations of no correlation; a stream has the same two members for 8 steps, hence 125 pairs
    assert np.abs(correlations).max() < 4 / np.sqrt(125)


def test_samples_change_places_within_their_members_too() -> None:
    """By member and by epoch: one stream walks through two members of 20, in two epochs."""
    order = GlobalOrder(manifest_of([[20, 20]]), seed=0, streams=1)
    walked = [order.places(order.positions(step))[0] for step in range(1, 81)]
    inner = [[p.sample for p in epoch if p.member == m] for epoch in (walked[:40], walked[40:]) for m in (0, 1)]
    assert all(sorted(samples) == list(range(20)) for samples in inner)
    assert len({tuple(samples) for samples in [*inner, range(20)]}) == 5


def test_what_is_read_together_are_neighbours_in_one_part() -> None:
    """220 members, so runs of 3; they are whole but where a shard or a stream's part ends, and hold their samples."""
    counts, streams = [[5, 1, 7] * 40, [3, 3] * 50], 10
    order = GlobalOrder(manifest_of(counts), seed=3, streams=streams)
    walked: dict[int, list[Run]] = {stream: [] for stream in range(streams)}
    for step in range(1, 820 // streams):
        for stream, (piece, n) in enumerate(zip(*order.pieces(order.positions(step)), strict=True)):
            run = piece.run
            assert 0 <= piece.samples[n] < sum(counts[run.shard][run.first : run.end])
            walked[stream] = walked[stream] if walked[stream][-1:] == [run] else [*walked[stream], run]
    for runs in walked.values():
        assert len(set(runs)) == len(runs)  # a stream is through with a run before it goes on
        for _, shard, first, end in runs[1:-1]:
            assert first % 3 == 0 and end == min(first + 3, len(counts[shard]))


def test_a_piece_is_one_object_as_long_as_its_stream_is_at_it() -> None:
    """By identity the reader tells what is new, of 50 streams through 64 samples each."""
    order = GlobalOrder(manifest_of([[16] * 200]), seed=0, streams=50)
    for step in (1, 30, 63):  # the next epoch begins after step 64
        (now, nth), (later, further) = (order.pieces(order.positions(s)) for s in (step, step + 1))
        for one, n, other, m in zip(now, nth, later, further, strict=True):
            assert (m == n + 1 and one is other) or (m == 0 and n == len(one.samples) - 1 and one is not other)


def test_runs_are_as_large_as_is_asked_for() -> None:
    counts = [[2] * 1000]  # members of 512 bytes
    for run_bytes, members in ((1, 1), (512, 1), (2048, 4), (5000, 10), (2**22, 15)):  # not fewer than 64 runs
        order = GlobalOrder(manifest_of(counts), seed=0, streams=1, run_bytes=run_bytes)
        runs = {piece.run for step in range(1, 2001) for piece in order.pieces(order.positions(step))[0]}
        assert max(end - first for _, _, first, end in runs) == members and len(runs) == -(-1000 // members)
        assert order.largest_run >= members * 1024 - 512


def test_a_batch_draws_on_as_many_members_as_it_can() -> None:
    """200 members for 50 streams: a batch meets 50 places of the set, though streams may meet in one member."""
    order = GlobalOrder(manifest_of([[8] * 200]), seed=0, streams=50)
    for step in range(1, 65):
        assert len({place[:2] for place in order.places(order.positions(step))}) == 50


@pytest.mark.parametrize("dp", [1, 4, 16])
def test_ranks_together_hardly_read_a_member_twice(dp: int) -> None:
    """20 members a stream: each member once, but for those where one stream ends and another begins."""
    streams, members, samples = 16, 320, 6
    order = GlobalOrder(manifest_of([[samples] * members]), seed=0, streams=streams)
    reads = 0
    for rank in range(dp):
        steps = range(1, members * samples // streams + 1)
        reads += len({p[:2] for step in steps for p in order.places(order.positions(step, rank, dp))})
    assert members <= reads <= 1.05 * members


def test_permutations_are_permutations_without_favourites() -> None:
    """Chi-square of where each of 8 elements lands; at 49 degrees of freedom 94 is exceeded once in 10,000 times."""
    counts = np.zeros((8, 8))
    for key in range(2000):
        order = permutation(key, 8)
        assert sorted(order) == list(range(8))
        counts[np.arange(8), order] += 1
    assert ((counts - 250) ** 2 / 250).sum() < 94


def test_permutations_never_change() -> None:
    """Philox4x64-10 and a stable sort are fixed; a run that resumes relies on the outcome."""
    assert permutation(12345, 10).tolist() == [7, 3, 4, 0, 9, 1, 2, 5, 8, 6]
