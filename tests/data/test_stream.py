"""The stream of training batches, over real shards on disk and in memory."""

import json
from itertools import islice

import pytest
import torch

from rdm_scale import rng
from rdm_scale.batch import LatentBatch
from rdm_scale.codecs.record import CodecRecord
from rdm_scale.config import DataConfig
from rdm_scale.data import LatentStream
from rdm_scale.data.manifest import MANIFEST_NAME
from rdm_scale.errors import ConfigError, DataError
from rdm_scale.storage.location import Location
from tests.support.latent_sets import LatentSet, WriteSet, assert_batches_equal, concatenate_batches, record_reads


def take(
    latents: LatentSet, steps: int, batch: int = 8, rank: int = 0, dp: int = 1, start: int = 0
) -> list[LatentBatch]:
    stream = LatentStream(latents.url, global_batch_size=batch, seed=5, dp_rank=rank, dp_size=dp, start_step=start)
    return list(islice(stream, steps))


@pytest.mark.parametrize("where", ["local", "memory"])
@pytest.mark.parametrize(("samples", "batch"), [(24, 8), (29, 8), (29, 29), (5, 12), (1, 4)])
def test_every_sample_once_per_epoch_with_its_label_and_latents(
    write_set: WriteSet, memory: Location, where: str, samples: int, batch: int
) -> None:
    latents = write_set(samples, place=memory if where == "memory" else None)
    batches = take(latents, steps=-(-3 * samples // batch), batch=batch)
    read = concatenate_batches(batches)
    assert read.positions.tolist() == list(range(len(batches) * batch))
    for epoch in range(3):
        ids = read.ids[epoch * samples : (epoch + 1) * samples]
        assert sorted(ids.tolist()) == latents.ids.tolist()
    index = read.ids - 1000
    assert read.latents.dtype == torch.float32 and torch.equal(read.latents, latents.latents[index])
    assert torch.equal(read.labels, latents.labels[index])


def test_a_lost_shard_reported_by_another_rank_is_substituted_from_the_next_step_on(write_set: WriteSet) -> None:
    """Also in segments that are in use: the batches are those of a rank that has known of the loss from the start."""
    latents = write_set(96)
    config = DataConfig(train=latents.url, lost_shards=1)
    stream = LatentStream(latents.url, global_batch_size=4, seed=5, config=config)
    batches = iter(stream)
    shard = int(next(batches).ids[0] - 1000) // 12  # three members of four samples
    lost = [[latents.manifest.digest, latents.manifest.shards[shard].name]]
    stream.lost_shards.merge(lost)
    informed = LatentStream(latents.url, global_batch_size=4, seed=5, config=config, start_step=1, lost=lost)
    for one, other in zip(islice(batches, 30), informed, strict=False):
        assert_batches_equal(one, other)
        assert not ((one.ids - 1000) // 12 == shard).any()


def test_an_unreadable_shard_within_the_budget_is_substituted_with_a_warning(write_set: WriteSet) -> None:
    latents = write_set(96)
    config = DataConfig(train=latents.url, lost_shards=1)
    stream = LatentStream(latents.url, global_batch_size=4, seed=5, config=config)
    (latents.folder / "shard-000003.tar").remove()
    batches = list(islice(stream, 24))
    assert stream.lost_shards.known == [[latents.manifest.digest, "shard-000003.tar"]]
    assert ["lost shard-000003.tar" in warning for warning in stream.lost_shards.take_warnings()] == [True]
    assert not any(((batch.ids - 1000) // 12 == 3).any() for batch in batches)


@pytest.mark.parametrize("dp", [2, 4])
def test_the_global_batch_is_the_same_for_any_number_of_ranks(write_set: WriteSet, dp: int) -> None:
    latents = write_set(29, kind="moments")
    ranks = [take(latents, 9, rank=rank, dp=dp) for rank in range(dp)]
    for expected, shares in zip(take(latents, 9), zip(*ranks, strict=True), strict=True):
        assert_batches_equal(expected, concatenate_batches(list(shares)))


@pytest.mark.parametrize("start", [1, 3, 4, 5])
def test_a_stream_starts_at_any_step(write_set: WriteSet, start: int) -> None:
    latents = write_set(29, kind="moments")
    walked = take(latents, 8)
    assert [batch.step for batch in walked] == list(range(1, 9))
    for expected, found in zip(walked[start:], take(latents, 8 - start, start=start), strict=True):
        assert_batches_equal(expected, found)


def test_a_distant_step_reads_no_more_than_the_first(write_set: WriteSet, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = write_set(600)
    reads = record_reads(monkeypatch)
    for start in (0, 100_000):
        reads.clear()
        LatentStream(latents.url, global_batch_size=8, seed=5).batch(start + 1)
        assert 0 < len(set(reads)) <= 8


def test_a_member_in_use_is_read_once(write_set: WriteSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if memory is limited to the reads in use and those ahead."""
    latents = write_set(640)  # 160 members, 20 per row
    tars = sum(shard.bytes for shard in latents.manifest.shards)
    monkeypatch.setattr("rdm_scale.data.contiguous_reader.KEPT_BYTES", 1)
    reads = record_reads(monkeypatch)
    take(latents, 80)
    ahead = 2 * 4 * tars / 80  # by the four workers, which have reached the second epoch
    assert sum(read.bytes for read in reads) <= 1.05 * tars + ahead


def test_latents_are_normalized_to_unit_scale(write_set: WriteSet) -> None:
    codec = CodecRecord(name="vae", location="vae", shift=(1.0, -2.0), scale=(0.5, 4.0))
    latents = write_set(8, codec=codec, dtype="float16")
    batch = take(latents, 1)[0]
    raw = latents.latents[batch.ids - 1000].float()
    assert torch.equal(batch.latents[:, 0], (raw[:, 0] - 1) * 0.5)
    assert torch.equal(batch.latents[:, 1], (raw[:, 1] + 2) * 4)


def test_moments_are_sampled_by_position(write_set: WriteSet) -> None:
    """Against a plain formula; the second epoch samples anew."""
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


@pytest.mark.parametrize(("batch", "rank", "dp"), [(8, 0, 3), (0, 0, 1), (8, 2, 2), (8, -1, 2), (8, 0, 0)])
def test_impossible_shares_are_refused(write_set: WriteSet, batch: int, rank: int, dp: int) -> None:
    with pytest.raises(ConfigError):
        take(write_set(8), 1, batch=batch, rank=rank, dp=dp)


def test_a_flipped_byte_is_found_when_its_member_is_read(write_set: WriteSet) -> None:
    latents = write_set(29)
    place = latents.folder / "shard-000001.tar"
    content = bytearray(place.read())
    content[latents.manifest.shards[1].members[2].offset + 300] ^= 0x10
    place.write(bytes(content))
    with pytest.raises(DataError, match=r"shard-000001\.tar is not what was written"):
        take(latents, 4)


def test_an_altered_manifest_does_not_hide_a_sample(write_set: WriteSet) -> None:
    """The counts still add up, but one sample is moved from one member to another."""
    latents = write_set(29, shape=(1, 1, 1, 1))
    place = latents.folder / MANIFEST_NAME
    tree = json.loads(place.read())
    tree["shards"][0]["members"][0]["samples"] -= 1
    tree["shards"][0]["members"][1]["samples"] += 1
    place.write(json.dumps(tree).encode())
    with pytest.raises(DataError, match="the manifest says"):
        take(latents, 4)
