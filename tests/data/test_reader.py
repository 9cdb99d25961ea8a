"""Members in memory: read once while in use, ahead of it, and let go of afterwards."""

import pytest
from latent_sets import LatentSet, WriteSet

from rdm_scale.config import DataSource
from rdm_scale.data.reader import MemberKey, MemberReader, open_set, stack
from rdm_scale.data.storage import Location
from rdm_scale.errors import DataError


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Offsets of all ranges read."""
    offsets: list[int] = []
    read_range = Location.read_range
    monkeypatch.setattr(Location, "read_range", lambda s, o, n: (offsets.append(o), read_range(s, o, n))[1])
    return offsets


def reader_of(latents: LatentSet, streams: int = 1, workers: int = 1) -> MemberReader:
    return MemberReader([open_set(DataSource(path=latents.url))], streams=streams, workers=workers, cache=None)


def keys(latents: LatentSet) -> list[MemberKey]:
    shards = latents.manifest.shards
    return [(0, s, m) for s, shard in enumerate(shards) for m in range(len(shard.members))]


def test_members_hold_what_was_written(write_set: WriteSet) -> None:
    latents = write_set(29)
    reader = reader_of(latents)
    found = reader.get(keys(latents))
    assert [number for member in found for number in member.ids] == latents.ids.tolist()
    assert [label for member in found for label in member.labels] == latents.labels.tolist()
    samples = [(member, index) for member in found for index in range(len(member.ids))]
    assert stack(samples, latents.latents.shape[1:], latents.latents.dtype).equal(latents.latents)


def test_those_used_last_are_kept(write_set: WriteSet, monkeypatch: pytest.MonkeyPatch, reads: list[int]) -> None:
    """Room for four members: after the fifth the first is read again, and the one used since it is not."""
    monkeypatch.setattr("rdm_scale.data.reader._MEMORY_BYTES", 1)
    latents = write_set(24, members_per_shard=6)  # six members of one size
    reader = reader_of(latents)  # one stream and one worker: twice two members
    one, two, three, four, five, _ = keys(latents)
    for key in (one, two, three, four, one, five):
        reader.get([key])
    assert len(reads) == 5
    reader.get([one])
    assert len(reads) == 5
    reader.get([two])
    assert len(reads) == 6


def test_what_is_expected_is_there_when_it_is_asked_for(write_set: WriteSet, reads: list[int]) -> None:
    latents = write_set(24)
    reader = reader_of(latents, workers=3)
    wanted = keys(latents)[:5]
    reader.expect(wanted)
    for key in reversed(wanted):
        reader.get([key])
    reader.close()
    assert len(reads) == 5 and reader.has_room


def test_a_read_that_failed_is_tried_again(write_set: WriteSet) -> None:
    latents = write_set(24)
    reader, key = reader_of(latents), keys(latents)[0]
    place = latents.folder / latents.manifest.shards[0].name
    content = place.read()
    place.remove()
    with pytest.raises(DataError, match="is missing"):
        reader.get([key])
    place.write(content)
    assert reader.get([key])[0].ids == latents.ids[:4].tolist()


def test_a_file_replaced_meanwhile_is_told_as_such(write_set: WriteSet) -> None:
    latents = write_set(24)
    reader = reader_of(latents)
    place = latents.folder / latents.manifest.shards[0].name
    content = place.read()
    place.write(bytes(len(content)) + b"and more")
    with pytest.raises(
        DataError, match=rf"was replaced while it was in use: it had {len(content)} bytes.*has {len(content) + 8}"
    ):
        reader.get([keys(latents)[0]])
