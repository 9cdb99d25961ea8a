"""Members in memory: read once while in use, ahead of it, and let go of afterwards."""

import pytest
import torch

from rdm_scale.codecs.record import CodecRecord
from rdm_scale.config import DataSource
from rdm_scale.data.order import Run
from rdm_scale.data.reader import RunReader, open_dataset, stack, stack_as_float
from rdm_scale.dtypes import STORED_DTYPES
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location
from tests.support.latent_sets import LatentSet, WriteSet


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Offsets of all ranges read."""
    offsets: list[int] = []
    read_into = Location.read_into
    monkeypatch.setattr(Location, "read_into", lambda s, o, n: (offsets.append(o), read_into(s, o, n))[1])
    return offsets


def reader_of(latents: LatentSet, streams: int = 1, workers: int = 1, largest: int = 1) -> RunReader:
    return RunReader(
        [open_dataset(DataSource(path=latents.url))], streams=streams, largest=largest, workers=workers, cache=None
    )


def keys(latents: LatentSet) -> list[Run]:
    shards = latents.manifest.shards
    return [Run(0, s, m, m + 1) for s, shard in enumerate(shards) for m in range(len(shard.members))]


def test_members_hold_what_was_written(write_set: WriteSet) -> None:
    latents = write_set(29)
    reader = reader_of(latents)
    found = reader.get(keys(latents))
    assert [number for member in found for number in member.ids] == latents.ids.tolist()
    assert [label for member in found for label in member.labels] == latents.labels.tolist()
    samples = [(member, index) for member in found for index in range(len(member.ids))]
    assert stack(samples, latents.latents.shape[1:], latents.latents.dtype).equal(latents.latents)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(2, 1, 3, 3), (4, 8, 32, 40)], ids=["small", "large"])
def test_samples_become_float_as_they_are_asked_for(
    write_set: WriteSet, shape: tuple[int, int, int, int], dtype: str
) -> None:
    latents = write_set(9, shape=shape, dtype=dtype)
    (first, second) = reader_of(latents).get(keys(latents)[:2])  # of 4 samples each
    found = stack_as_float([(second, 3), (first, 0), (second, 1)], shape, STORED_DTYPES[dtype].torch)
    assert found.dtype == torch.float32
    assert torch.equal(found, latents.latents[[7, 0, 5]].float())


@pytest.mark.parametrize("shape", [(2, 1, 3, 3), (2, 8, 64, 64)], ids=["small", "large"])
def test_samples_are_brought_to_unit_scale_as_they_become_float(
    write_set: WriteSet, shape: tuple[int, int, int, int]
) -> None:
    codec = CodecRecord(name="vae", location="vae", shift=(1.0, -2.0), scale=(0.5, 4.0))
    latents = write_set(9, shape=shape, dtype="float16", codec=codec)
    (members,) = reader_of(latents).get(keys(latents)[1:2])  # samples 4 to 7
    found = stack_as_float([(members, 2), (members, 0), (members, 2)], shape, torch.float16, codec)
    raw = latents.latents[[6, 4, 6]].float()
    assert torch.equal(found[:, 0], (raw[:, 0] - 1) * 0.5) and torch.equal(found[:, 1], (raw[:, 1] + 2) * 4)


def test_what_is_taken_of_a_run_is_in_that_order_and_begins_again_at_its_end(write_set: WriteSet) -> None:
    latents = write_set(24, members_per_shard=6)
    (run,) = reader_of(latents).get([Run(0, 0, 1, 3)])  # samples 4 to 11
    taken, wanted = run.take([7, 2, 9]), [11, 6, 5]
    assert list(taken.ids) == latents.ids[wanted].tolist() and list(taken.labels) == latents.labels[wanted].tolist()
    raw = stack([(taken, n) for n in range(3)], latents.latents.shape[1:], latents.latents.dtype)
    assert raw.equal(latents.latents[wanted])


def test_those_used_last_are_kept(write_set: WriteSet, monkeypatch: pytest.MonkeyPatch, reads: list[int]) -> None:
    """Room for three members: after the fourth the second is read again, and the one used since it is not."""
    monkeypatch.setattr("rdm_scale.data.reader._MEMORY_BYTES", 1)
    latents = write_set(24, members_per_shard=6)  # six members of one size
    size = latents.manifest.shards[0].members[0].bytes
    reader = reader_of(latents, largest=size)  # one stream, and one worker with two ahead
    one, two, three, four, *_ = keys(latents)
    for key in (one, two, three, one, four):
        reader.get([key])
    assert len(reads) == 4
    reader.get([one])
    assert len(reads) == 4
    reader.get([two])
    assert len(reads) == 5


def test_what_is_released_goes_first(write_set: WriteSet, monkeypatch: pytest.MonkeyPatch, reads: list[int]) -> None:
    monkeypatch.setattr("rdm_scale.data.reader._MEMORY_BYTES", 1)
    latents = write_set(24, members_per_shard=6)
    reader = reader_of(latents, largest=latents.manifest.shards[0].members[0].bytes)
    one, two, three, four, *_ = keys(latents)
    reader.get([one, two, three])
    reader.release([three])
    reader.get([four])
    reader.get([one, two])
    assert len(reads) == 4
    reader.get([three])
    assert len(reads) == 5


def test_no_more_is_expected_than_there_is_room_for(write_set: WriteSet, reads: list[int]) -> None:
    latents = write_set(24)
    reader = reader_of(latents, workers=2)
    reader.expect(keys(latents)[:6])
    assert not reader.has_room
    reader.get(keys(latents)[:4])
    assert reader.has_room and len(reads) == 4


def test_neighbours_are_read_at_once_and_each_is_checked(write_set: WriteSet, reads: list[int]) -> None:
    latents = write_set(24, members_per_shard=6)
    reader, key = reader_of(latents), Run(0, 0, 1, 5)
    (found,) = reader.get([key])
    assert len(reads) == 1 and list(found.ids) == latents.ids[4:20].tolist()
    whole = stack([(found, n) for n in range(16)], latents.latents.shape[1:], latents.latents.dtype)
    assert whole.equal(latents.latents[4:20])
    place, members = latents.folder / latents.manifest.shards[0].name, latents.manifest.shards[0].members
    content = bytearray(place.read())
    content[members[3].offset + 300] ^= 1
    place.write(bytes(content))
    with pytest.raises(DataError, match=rf"member {members[3].name} \(3, .* is not what was written|was replaced"):
        reader_of(latents).get([key])


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
    assert list(reader.get([key])[0].ids) == latents.ids[:4].tolist()


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
