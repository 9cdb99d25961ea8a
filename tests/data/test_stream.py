"""The stream and the held-out set, over real shards on disk and in memory."""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pytest
import torch

from rdm_scale import rng
from rdm_scale.batch import LatentBatch
from rdm_scale.codecs.record import CodecRecord
from rdm_scale.config import DataConfig
from rdm_scale.data import LatentStream
from rdm_scale.data.assembly import posterior_sample
from rdm_scale.data.held_out import HeldOut
from rdm_scale.data.manifest import MANIFEST_NAME
from rdm_scale.errors import ConfigError, DataError
from rdm_scale.storage.location import Location
from tests.support.latent_sets import LatentSet, WriteSet


def take(
    latents: LatentSet, steps: int, batch: int = 8, rank: int = 0, dp: int = 1, start: int = 0
) -> list[LatentBatch]:
    stream = LatentStream(latents.url, global_batch_size=batch, seed=5, dp_rank=rank, dp_size=dp, start_step=start)
    return list(islice(stream, steps))


def ids_of(batches: list[LatentBatch]) -> list[int]:
    return torch.cat([batch.ids for batch in batches]).tolist()


def assert_equal(one: LatentBatch, other: LatentBatch) -> None:
    assert one.step == other.step
    for name in ("positions", "ids", "labels", "latents"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def joined(parts: list[LatentBatch]) -> LatentBatch:
    names = ("positions", "ids", "labels", "latents")
    return LatentBatch(parts[0].step, **{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def count_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes of each range of each file that are read from now on."""
    ranges: Counter[str] = Counter()
    read_into = Location.read_into
    monkeypatch.setattr(
        Location, "read_into", lambda s, o, n: (ranges.update({f"{s}:{o}": len(n)}), read_into(s, o, n))[1]
    )
    return ranges


# The stream


@pytest.mark.parametrize("where", ["local", "memory"])
@pytest.mark.parametrize(("samples", "batch"), [(24, 8), (29, 8), (29, 29), (5, 12), (1, 4)])
def test_every_sample_once_an_epoch_with_what_belongs_to_it(
    write_set: WriteSet, memory: Location, where: str, samples: int, batch: int
) -> None:
    latents = write_set(samples, place=memory if where == "memory" else None)
    batches = take(latents, steps=-(-3 * samples // batch), batch=batch)
    read = joined(batches)
    assert read.positions.tolist() == list(range(len(batches) * batch))
    for epoch in range(3):
        ids = read.ids[epoch * samples : (epoch + 1) * samples]
        assert sorted(ids.tolist()) == latents.ids.tolist()
    index = read.ids - 1000
    assert read.latents.dtype == torch.float32 and torch.equal(read.latents, latents.latents[index])
    assert torch.equal(read.labels, latents.labels[index])


def test_a_loss_that_another_rank_has_found_counts_from_the_next_step_on(write_set: WriteSet) -> None:
    """Also for what is in use: every rank reads what a rank would that has known of it all along."""
    latents = write_set(96)
    config = DataConfig(train=latents.url, lost_shards=1)
    stream = LatentStream(latents.url, global_batch_size=4, seed=5, config=config)
    batches = iter(stream)
    shard = int(next(batches).ids[0] - 1000) // 12  # of three members of four samples
    lost = [[latents.manifest.digest, latents.manifest.shards[shard].name]]
    stream.lost_shards.merge(lost)
    knowing = LatentStream(latents.url, global_batch_size=4, seed=5, config=config, start_step=1, lost=lost)
    for one, other in zip(islice(batches, 30), knowing, strict=False):
        assert_equal(one, other)
        assert not ((one.ids - 1000) // 12 == shard).any()


@pytest.mark.parametrize("dp", [2, 4])
def test_the_global_batch_is_the_same_for_every_number_of_ranks(write_set: WriteSet, dp: int) -> None:
    latents = write_set(29, kind="moments")
    ranks = [take(latents, 9, rank=rank, dp=dp) for rank in range(dp)]
    for whole, shares in zip(take(latents, 9), zip(*ranks, strict=True), strict=True):
        assert_equal(whole, joined(list(shares)))


@pytest.mark.parametrize("start", [1, 3, 4, 5])
def test_a_stream_begins_anywhere(write_set: WriteSet, start: int) -> None:
    latents = write_set(29, kind="moments")
    walked = take(latents, 8)
    assert [batch.step for batch in walked] == list(range(1, 9))
    for expected, found in zip(walked[start:], take(latents, 8 - start, start=start), strict=True):
        assert_equal(expected, found)


def test_a_far_step_reads_no_more_than_the_first(write_set: WriteSet, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = write_set(600)
    ranges = count_reads(monkeypatch)
    for start in (0, 100_000):
        ranges.clear()
        LatentStream(latents.url, global_batch_size=8, seed=5).batch(start + 1)
        assert 0 < len(ranges) <= 8


def test_a_member_in_use_is_read_once(write_set: WriteSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where memory could not hold one run but for its promise of one a stream."""
    latents = write_set(640)  # 160 members, 20 a stream
    tars = sum(shard.bytes for shard in latents.manifest.shards)
    monkeypatch.setattr("rdm_scale.data.reader._MEMORY_BYTES", 1)
    ranges = count_reads(monkeypatch)
    take(latents, 80)
    ahead = 2 * 4 * tars / 80  # of the four workers, who are at the second epoch by then
    assert ranges.total() <= 1.05 * tars + ahead


def test_latents_are_brought_to_unit_scale(write_set: WriteSet) -> None:
    codec = CodecRecord(name="vae", location="vae", shift=(1.0, -2.0), scale=(0.5, 4.0))
    latents = write_set(8, codec=codec, dtype="float16")
    batch = take(latents, 1)[0]
    raw = latents.latents[batch.ids - 1000].float()
    assert torch.equal(batch.latents[:, 0], (raw[:, 0] - 1) * 0.5)
    assert torch.equal(batch.latents[:, 1], (raw[:, 1] + 2) * 4)


def test_moments_are_sampled_by_position(write_set: WriteSet) -> None:
    """Against a plain formula; and the second epoch draws anew."""
    codec = CodecRecord(name="vae", location="vae", shift=(0.25,), scale=(2.0,))
    latents = write_set(8, kind="moments", codec=codec)
    one, two = take(latents, 2)
    for batch in (one, two):
        for k, position in enumerate(batch.positions.tolist()):
            mean, log_variance = latents.latents[batch.ids[k] - 1000].split(2)
            noise = torch.randn(2, 1, 3, 3, generator=rng.generator(5, "posterior", position))
            expected = (mean + torch.exp(log_variance / 2) * noise - 0.25) * 2
            torch.testing.assert_close(batch.latents[k], expected, rtol=1e-6, atol=1e-6)
    order = torch.argsort(one.ids), torch.argsort(two.ids)
    assert not torch.allclose(one.latents[order[0]], two.latents[order[1]])


def test_log_variances_are_clamped() -> None:
    log_variance = torch.tensor([-1e4, -30.0, 0.0, 20.0, 1e4]).view(1, 5, 1, 1, 1)
    moments = torch.cat([torch.full_like(log_variance, 3.0), log_variance], dim=1)
    spread = posterior_sample(moments, torch.ones(1, 5, 1, 1, 1)).flatten() - 3
    expected = torch.tensor([-15.0, -15.0, 0.0, 10.0, 10.0]).exp()
    torch.testing.assert_close(spread, expected, rtol=1e-6, atol=3e-7)


@pytest.mark.parametrize(("batch", "rank", "dp"), [(8, 0, 3), (0, 0, 1), (8, 2, 2), (8, -1, 2), (8, 0, 0)])
def test_impossible_shares_are_refused(write_set: WriteSet, batch: int, rank: int, dp: int) -> None:
    with pytest.raises(ConfigError):
        take(write_set(8), 1, batch=batch, rank=rank, dp=dp)


@pytest.mark.parametrize("where", ["local", "memory"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "longer"])
def test_shards_that_do_not_fit_the_manifest_are_found_at_the_start(
    write_set: WriteSet, memory: Location, where: str, damage: str
) -> None:
    latents = write_set(29, place=memory if where == "memory" else None)
    for name in ("shard-000001.tar", "shard-000002.tar"):
        place = latents.folder / name
        content = place.read()
        if damage == "missing":
            place.remove()
        else:
            place.write(content[:-1] if damage == "truncated" else content + b"\0")
    first, size = latents.folder / "shard-000001.tar", latents.manifest.shards[1].bytes
    found = {"missing": "is missing", "truncated": f"has {size - 1} bytes", "longer": f"has {size + 1} bytes"}[damage]
    for build in (lambda: take(latents, 0), lambda: HeldOut(latents.url, 8, batch_size=4)):
        with pytest.raises(DataError, match=found) as raised:
            build()
        assert str(first) in str(raised.value)


def test_a_flipped_byte_is_found_when_its_member_is_read(write_set: WriteSet) -> None:
    latents = write_set(29)
    place = latents.folder / "shard-000001.tar"
    content = bytearray(place.read())
    content[latents.manifest.shards[1].members[2].offset + 300] ^= 0x10
    place.write(bytes(content))
    with pytest.raises(DataError, match=r"shard-000001\.tar is not what was written"):
        take(latents, 4)


def test_an_altered_manifest_does_not_hide_a_sample(write_set: WriteSet) -> None:
    """A manifest that adds up but moves a sample from one member to another."""
    latents = write_set(29, shape=(1, 1, 1, 1))
    place = latents.folder / MANIFEST_NAME
    tree = json.loads(place.read())
    tree["shards"][0]["members"][0]["samples"] -= 1
    tree["shards"][0]["members"][1]["samples"] += 1
    place.write(json.dumps(tree).encode())
    with pytest.raises(DataError, match="the manifest says"):
        take(latents, 4)


# The held-out set


def walk(url: str, samples: int, batch: int, dp: int) -> Iterator[tuple[int, LatentBatch, torch.Tensor]]:
    for rank in range(dp):
        for latents, weights in HeldOut(url, samples, batch_size=batch, dp_rank=rank, dp_size=dp):
            yield rank, latents, weights


@pytest.mark.parametrize(
    ("samples", "batch", "dp"), [(29, 4, 1), (29, 4, 2), (11, 2, 4), (3, 2, 4), (100, 16, 3), (1, 1, 1), (8, 4, 2)]
)
def test_the_held_out_set_is_read_once_over_the_ranks(write_set: WriteSet, samples: int, batch: int, dp: int) -> None:
    latents = write_set(29)
    size = min(samples, 29)
    seen, batches = [], Counter()
    for rank, part, weights in walk(latents.url, samples, batch, dp):
        assert part.latents.shape == (batch, 2, 1, 3, 3) and weights.dtype == torch.float64
        assert set(weights.tolist()) <= {0.0, 1.0}
        assert torch.equal(part.ids, part.positions + 1000)
        assert torch.equal(part.latents, latents.latents[part.positions])
        assert torch.equal(part.labels, latents.labels[part.positions])
        seen += part.positions[weights == 1].tolist()
        batches[rank] += 1
    assert sorted(seen) == list(range(size))
    assert set(batches.values()) == {-(-size // (batch * dp))} and len(batches) == dp  # collectives stay in step
    held_out = HeldOut(latents.url, samples, batch_size=batch, dp_size=dp)
    assert held_out.samples == size and len(held_out) == batches[0]


def test_a_held_out_sample_is_the_same_in_every_layout_and_run(write_set: WriteSet) -> None:
    latents = write_set(29, kind="moments")
    draws: dict[int, torch.Tensor] = {}
    for batch, dp in ((29, 1), (4, 2), (3, 4)):
        for _, part, _ in walk(latents.url, 29, batch, dp):
            for position, values in zip(part.positions.tolist(), part.latents, strict=True):
                assert torch.equal(values, draws.setdefault(position, values))
    assert len(draws) == 29


@pytest.mark.parametrize(("samples", "batch", "rank", "dp"), [(0, 1, 0, 1), (1, 0, 0, 1), (1, 1, 1, 1)])
def test_impossible_held_out_sets_are_refused(
    write_set: WriteSet, samples: int, batch: int, rank: int, dp: int
) -> None:
    with pytest.raises(ConfigError):
        HeldOut(write_set(4).url, samples, batch_size=batch, dp_rank=rank, dp_size=dp)
