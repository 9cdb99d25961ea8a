"""Contiguous reads: kept while in use, prefetched before it, evicted after it, and checked against the manifest."""

import pytest

from rdm_scale.data.assembly import stack_raw
from rdm_scale.data.loaded_samples import LoadedSample
from rdm_scale.data.order import ContiguousRead
from rdm_scale.errors import DataError
from tests.support.latent_sets import RangeRead, WriteSet, open_reader, reads_of_members, record_reads


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[RangeRead]:
    """Record of the range requests."""
    return record_reads(monkeypatch)


def test_members_contain_what_was_written(write_set: WriteSet) -> None:
    latents = write_set(29)
    loaded = open_reader(latents).get(reads_of_members(latents))
    assert [number for member in loaded for number in member.ids] == latents.ids.tolist()
    assert [label for member in loaded for label in member.labels] == latents.labels.tolist()
    samples = [LoadedSample(member, n) for member in loaded for n in range(len(member.ids))]
    assert stack_raw(samples, latents.latents.shape[1:], latents.latents.dtype).equal(latents.latents)


def test_the_most_recently_used_reads_are_kept(
    write_set: WriteSet, monkeypatch: pytest.MonkeyPatch, reads: list[RangeRead]
) -> None:
    """Room for three members: the fourth evicts the second, and not the first, which was used since."""
    monkeypatch.setattr("rdm_scale.data.contiguous_reader.KEPT_BYTES", 1)
    latents = write_set(24, members_per_shard=6)  # six members of one size
    size = latents.manifest.shards[0].members[0].bytes
    reader = open_reader(latents, largest=size)  # one read in use, and one worker with two ahead
    one, two, three, four, *_ = reads_of_members(latents)
    for key in (one, two, three, one, four):
        reader.get([key])
    assert len(reads) == 4
    reader.get([one])
    assert len(reads) == 4
    reader.get([two])
    assert len(reads) == 5


def test_released_reads_are_evicted_first(
    write_set: WriteSet, monkeypatch: pytest.MonkeyPatch, reads: list[RangeRead]
) -> None:
    monkeypatch.setattr("rdm_scale.data.contiguous_reader.KEPT_BYTES", 1)
    latents = write_set(24, members_per_shard=6)
    reader = open_reader(latents, largest=latents.manifest.shards[0].members[0].bytes)
    one, two, three, four, *_ = reads_of_members(latents)
    reader.get([one, two, three])
    reader.release([three])
    reader.get([four])
    reader.get([one, two])
    assert len(reads) == 4
    reader.get([three])
    assert len(reads) == 5


def test_no_more_is_prefetched_than_there_is_room_for(write_set: WriteSet, reads: list[RangeRead]) -> None:
    latents = write_set(24)
    reader = open_reader(latents, workers=2)
    reader.prefetch(reads_of_members(latents)[:6])
    assert not reader.has_room
    reader.get(reads_of_members(latents)[:4])
    assert reader.has_room and len(reads) == 4


def test_neighboring_members_are_read_by_one_request_and_each_is_checked(
    write_set: WriteSet, reads: list[RangeRead]
) -> None:
    latents = write_set(24, members_per_shard=6)
    reader, key = open_reader(latents), ContiguousRead(0, 0, 1, 5)
    (found,) = reader.get([key])
    assert len(reads) == 1 and list(found.ids) == latents.ids[4:20].tolist()
    stacked = stack_raw([LoadedSample(found, n) for n in range(16)], latents.latents.shape[1:], latents.latents.dtype)
    assert stacked.equal(latents.latents[4:20])
    place, members = latents.folder / latents.manifest.shards[0].name, latents.manifest.shards[0].members
    content = bytearray(place.read())
    content[members[3].offset + 300] ^= 1
    place.write(bytes(content))
    with pytest.raises(DataError, match=rf"member {members[3].name} \(3, .* is not what was written|was replaced"):
        open_reader(latents).get([key])


def test_prefetched_reads_are_not_read_again(write_set: WriteSet, reads: list[RangeRead]) -> None:
    latents = write_set(24)
    reader = open_reader(latents, workers=3)
    wanted = reads_of_members(latents)[:5]
    reader.prefetch(wanted)
    for key in reversed(wanted):
        reader.get([key])
    reader.close()
    assert len(reads) == 5 and reader.has_room


def test_a_failed_read_is_tried_again(write_set: WriteSet) -> None:
    latents = write_set(24)
    reader, key = open_reader(latents), reads_of_members(latents)[0]
    place = latents.folder / latents.manifest.shards[0].name
    content = place.read()
    place.remove()
    with pytest.raises(DataError, match="is missing"):
        reader.get([key])
    place.write(content)
    assert list(reader.get([key])[0].ids) == latents.ids[:4].tolist()


def test_a_replaced_file_is_reported_as_replaced(write_set: WriteSet) -> None:
    latents = write_set(24)
    reader = open_reader(latents)
    place = latents.folder / latents.manifest.shards[0].name
    content = place.read()
    place.write(bytes(len(content)) + b"and more")
    with pytest.raises(
        DataError, match=rf"was replaced while it was in use: it had {len(content)} bytes.*has {len(content) + 8}"
    ):
        reader.get([reads_of_members(latents)[0]])
