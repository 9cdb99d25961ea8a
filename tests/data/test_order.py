"""The global order: every sample once per epoch, for any number of ranks, from any step, and well mixed."""

from itertools import chain, islice

import numpy as np
import pytest

from rdm_scale.codecs.record import CodecRecord
from rdm_scale.data.manifest import Manifest, Shard, TarMember
from rdm_scale.data.order import ContiguousRead, GlobalOrder, SampleLocation, permutation

# (samples of each member, by shard; C): even; uneven; C does not divide N; C > N; one sample; one row; ...
CASES = [
    ([[4, 4, 4], [4, 4, 4]], 8),
    ([[5, 1, 7], [3], [2, 2, 9]], 4),
    ([[5, 1, 7], [3], [2, 2, 9]], 6),
    ([[5, 1, 7], [3], [2, 2, 8]], 28),
    ([[3, 2], [1, 1]], 20),
    ([[1]], 4),
    ([[3, 3], [1]], 1),
    ([[64] * 5, [64] * 3, [64, 17]], 96),
    ([[5, 1, 7] * 40, [3, 3] * 50, [2]], 24),  # reads of several members
]


def manifest_of(counts: list[list[int]]) -> Manifest:
    """A manifest without files: the order depends on counts and sizes only."""

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


def all_locations(counts: list[list[int]]) -> list[SampleLocation]:
    return [
        SampleLocation(s, m, sample)
        for s, shard in enumerate(counts)
        for m, n in enumerate(shard)
        for sample in range(n)
    ]


@pytest.mark.parametrize(("counts", "rows"), CASES)
def test_every_sample_once_per_epoch_with_tails_carried_over(counts: list[list[int]], rows: int) -> None:
    order, locations = GlobalOrder(manifest_of(counts), seed=3, global_batch_size=rows), all_locations(counts)
    N, epochs = len(locations), 4
    steps = -(-epochs * N // rows)
    walked = list(chain.from_iterable(order.locations(order.positions(step)) for step in range(1, steps + 1)))
    read = [walked[e * N : (e + 1) * N] for e in range(epochs)]
    for epoch in read:
        assert sorted(epoch) == locations
    if N > 12:
        assert len({tuple(epoch) for epoch in read}) == epochs


@pytest.mark.parametrize(("counts", "rows"), CASES)
def test_ranks_share_each_step_without_changing_it(counts: list[list[int]], rows: int) -> None:
    order = GlobalOrder(manifest_of(counts), seed=3, global_batch_size=rows)
    for step in (1, 2, 7, 100_000):
        whole = list(order.positions(step))
        assert whole == [(step - 1) * rows + c for c in range(rows)]
        for dp in (size for size in (1, 2, 4) if rows % size == 0):
            shares = [order.positions(step, rank, dp) for rank in range(dp)]
            assert {len(share) for share in shares} == {rows // dp} and [*chain(*shares)] == whole


def test_any_step_is_the_same_with_and_without_the_steps_before_it() -> None:
    manifest = manifest_of([[5, 1, 7], [3], [2, 2, 9]])
    walker = GlobalOrder(manifest, seed=3, global_batch_size=4)
    walked = [walker.locations(walker.positions(step)) for step in range(1, 60)]
    for step in (59, 1, 30, 8, 7):
        fresh = GlobalOrder(manifest, seed=3, global_batch_size=4)
        assert fresh.locations(fresh.positions(step)) == walked[step - 1] == walker.locations(walker.positions(step))


def test_a_distant_step_needs_only_the_tables_of_its_own_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts permutations: a walk to step 100,000 would make hundreds of thousands."""
    made = []
    monkeypatch.setattr("rdm_scale.data.order.permutation", lambda *args: (made.append(args), permutation(*args))[1])
    counts = [[8] * 20] * 5
    for step in (1, 100_000):
        made.clear()
        order = GlobalOrder(manifest_of(counts), seed=0, global_batch_size=16)
        order.locations(order.positions(step))
        assert sum(size == 100 for _, size in made) <= 2 and len(made) <= 2 + 16


def test_seeds_and_epochs_give_unrelated_orders() -> None:
    counts = [[8] * 25] * 5
    orders = [
        list(islice(chain.from_iterable(order.locations(order.positions(s)) for s in range(1, 21)), 1000))
        for order in (GlobalOrder(manifest_of(counts), seed=seed, global_batch_size=100) for seed in (0, 1))
    ]
    orders = [*orders, orders[0]]
    other = GlobalOrder(manifest_of(counts), seed=0, global_batch_size=100)
    orders[2] = list(chain.from_iterable(other.locations(other.positions(s)) for s in range(11, 21)))
    index = {location: i for i, location in enumerate(all_locations(counts))}
    ranks = np.array([[index[location] for location in order] for order in orders])
    correlations = np.corrcoef(ranks)[np.triu_indices(3, 1)]
    # Four standard deviations; a row reads the same two members for 8 steps, hence 125 independent pairs.
    assert np.abs(correlations).max() < 4 / np.sqrt(125)


def test_samples_are_permuted_within_their_members() -> None:
    """One row walks through two members of 20 samples, in two epochs; all four orders differ."""
    order = GlobalOrder(manifest_of([[20, 20]]), seed=0, global_batch_size=1)
    walked = [order.locations(order.positions(step))[0] for step in range(1, 81)]
    inner = [[p.sample for p in epoch if p.member == m] for epoch in (walked[:40], walked[40:]) for m in (0, 1)]
    assert all(sorted(samples) == list(range(20)) for samples in inner)
    assert len({tuple(samples) for samples in [*inner, range(20)]}) == 5


def test_reads_are_contiguous_and_complete_but_at_the_ends_of_parts() -> None:
    """220 members, so reads of 3; shorter only at the end of a shard or of a row's part."""
    counts, rows = [[5, 1, 7] * 40, [3, 3] * 50], 10
    order = GlobalOrder(manifest_of(counts), seed=3, global_batch_size=rows)
    walked: dict[int, list[ContiguousRead]] = {row: [] for row in range(rows)}
    for step in range(1, 820 // rows):
        for row, (segment, n) in enumerate(zip(*order.segments(order.positions(step)), strict=True)):
            read = segment.read
            assert 0 <= segment.samples[n] < sum(counts[read.shard][read.first : read.end])
            walked[row] = walked[row] if walked[row][-1:] == [read] else [*walked[row], read]
    for reads in walked.values():
        assert len(set(reads)) == len(reads)  # a row finishes a read before it starts the next
        for _, shard, first, end in reads[1:-1]:
            assert first % 3 == 0 and end == min(first + 3, len(counts[shard]))


def test_a_segment_is_one_object_while_a_row_walks_through_it() -> None:
    """The loader recognizes new segments by identity; 50 rows walk through 64 samples each."""
    order = GlobalOrder(manifest_of([[16] * 200]), seed=0, global_batch_size=50)
    for step in (1, 30, 63):  # the next epoch begins after step 64
        (now, nth), (later, further) = (order.segments(order.positions(s)) for s in (step, step + 1))
        for one, n, other, m in zip(now, nth, later, further, strict=True):
            assert (m == n + 1 and one is other) or (m == 0 and n == len(one.samples) - 1 and one is not other)


def test_reads_have_the_target_size() -> None:
    counts = [[2] * 1000]  # members of 512 bytes
    for read_bytes, members in ((1, 1), (512, 1), (2048, 4), (5000, 10), (2**22, 15)):  # at least 64 reads
        order = GlobalOrder(manifest_of(counts), seed=0, global_batch_size=1, read_bytes=read_bytes)
        reads = {segment.read for step in range(1, 2001) for segment in order.segments(order.positions(step))[0]}
        assert max(end - first for _, _, first, end in reads) == members and len(reads) == -(-1000 // members)
        assert order.largest_read >= members * 1024 - 512


def test_a_batch_draws_on_as_many_members_as_possible() -> None:
    """200 members for 50 rows: a batch reads 50 different members."""
    order = GlobalOrder(manifest_of([[8] * 200]), seed=0, global_batch_size=50)
    for step in range(1, 65):
        assert len({location[:2] for location in order.locations(order.positions(step))}) == 50


@pytest.mark.parametrize("dp", [1, 4, 16])
def test_ranks_together_rarely_read_a_member_twice(dp: int) -> None:
    """20 members per row: each member once, except where one row's part ends and the next begins."""
    rows, members, samples = 16, 320, 6
    order = GlobalOrder(manifest_of([[samples] * members]), seed=0, global_batch_size=rows)
    reads = 0
    for rank in range(dp):
        steps = range(1, members * samples // rows + 1)
        reads += len({p[:2] for step in steps for p in order.locations(order.positions(step, rank, dp))})
    assert members <= reads <= 1.05 * members


def test_permutations_are_uniform() -> None:
    """Chi-square of where each of 8 elements lands; at 49 degrees of freedom 94 is exceeded once in 10,000 times."""
    counts = np.zeros((8, 8))
    for key in range(2000):
        order = permutation(key, 8)
        assert sorted(order) == list(range(8))
        counts[np.arange(8), order] += 1
    assert ((counts - 250) ** 2 / 250).sum() < 94


def test_permutations_never_change() -> None:
    """Philox4x64-10 and a stable sort are fixed; a resumed run relies on the outcome."""
    assert permutation(12345, 10).tolist() == [7, 3, 4, 0, 9, 1, 2, 5, 8, 6]


def test_the_order_never_changes() -> None:
    """Literal samples of a fixed seed: runs that were started by earlier releases continue in the same order."""
    order = GlobalOrder(manifest_of([[5, 1, 7], [3], [2, 2, 9]]), seed=3, global_batch_size=4)
    assert [tuple(location) for location in order.locations(order.positions(8))] == [
        (2, 2, 2),
        (0, 0, 3),
        (2, 2, 4),
        (2, 0, 1),
    ]
