"""Shards: what the writer writes and refuses, and that every kind of damage is detected."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import webdataset
import xxhash
from torch import Tensor

from rdm_scale.codecs.record import CodecRecord
from rdm_scale.data.manifest import MANIFEST_NAME, TarMember, read_manifest
from rdm_scale.data.shard_writer import ShardWriter, sample_id
from rdm_scale.data.shards import read_member
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location
from tests.support.latent_sets import IDENTITY, LatentSet, WriteSet

ONE = torch.ones(1, 2, 1, 3, 3)


def ints(*values: int) -> Tensor:
    return torch.tensor(values)


def writer_in(folder: Location, **changes: Any) -> ShardWriter:
    options: dict[str, Any] = {
        "kind": "mode",
        "dtype": "float32",
        "shape": (2, 1, 3, 3),
        "codec": IDENTITY,
        "class_names": ("zero", "one", "two"),
        "samples_per_member": 2,
        "members_per_shard": 2,
    }
    return ShardWriter(folder, **(options | changes))


def all_members(latents: LatentSet) -> list[dict[str, Tensor]]:
    places = [(s, m) for s, shard in enumerate(latents.manifest.shards) for m in range(len(shard.members))]
    return [read_member(latents.folder, latents.manifest, s, m) for s, m in places]


def joined(members: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([member[name] for member in members]) for name in ("latents", "ids", "labels")}


def assert_same(found: dict[str, Tensor], latents: LatentSet) -> None:
    for name, values in found.items():
        assert values.dtype == getattr(latents, name).dtype and torch.equal(values, getattr(latents, name))


# Ids


def test_sample_id_is_the_documented_hash() -> None:
    assert sample_id("a/b.png") == xxhash.xxh3_64(b"a/b.png\x1f0\x1f0").intdigest() % 2**63
    assert sample_id("clip.mp4", clip=3, view=1) == xxhash.xxh3_64(b"clip.mp4\x1f3\x1f1").intdigest() % 2**63


def test_sample_ids_of_keys_clips_and_views_differ() -> None:
    arguments = [(key, clip, view) for key in ("a", "a1", "a\x1f1", "") for clip in range(12) for view in range(12)]
    ids = {sample_id(*each) for each in arguments}
    assert len(ids) == len(arguments) and min(ids) >= 0 and max(ids) < 2**63


# Writing


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["mode", "moments"])
def test_what_was_written_is_read(write_set: WriteSet, memory: Location, kind: str, dtype: str) -> None:
    latents = write_set(29, place=memory, kind=kind, dtype=dtype)
    assert_same(joined(all_members(latents)), latents)


def test_members_and_shards_are_filled_in_order(write_set: WriteSet) -> None:
    """29 samples, 4 per member, 3 members per shard: 7 full members and one of 1, in 2 full shards and one of 2."""
    latents = write_set(29)
    assert latents.folder.names() == [MANIFEST_NAME, "shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert [[m.samples for m in shard.members] for shard in latents.manifest.shards] == [[4, 4, 4], [4, 4, 4], [4, 1]]
    names = [member.name for shard in latents.manifest.shards for member in shard.members]
    assert names == [f"{i:08d}.safetensors" for i in range(8)]
    assert read_manifest(latents.url)[0] == latents.manifest


@pytest.mark.parametrize("add", [1, 4, 5, 29])
def test_bytes_do_not_depend_on_when_or_how_samples_are_added(
    write_set: WriteSet, monkeypatch: pytest.MonkeyPatch, add: int
) -> None:
    one = write_set(29)
    monkeypatch.setattr("time.time", lambda: 1.5e9)
    other = write_set(29, add=add)
    for name in one.folder.names():
        assert (one.folder / name).read() == (other.folder / name).read()


def test_shards_are_plain_ustar(write_set: WriteSet) -> None:
    latents = write_set(29)
    read = []
    for shard in latents.manifest.shards:
        content = (latents.folder / shard.name).read()
        assert len(content) == shard.bytes and hashlib.sha256(content).hexdigest() == shard.sha256
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for info, member in zip(tar.getmembers(), shard.members, strict=True):
                assert (info.name, info.offset_data, info.size) == (member.name, member.offset, member.bytes)
                assert (info.mtime, info.uid, info.gid, info.mode, info.uname) == (0, 0, 0, 0o644, "")
                assert content[info.offset + 257 : info.offset + 265] == b"ustar\x0000"
                assert info.isreg() and not info.pax_headers
                payload = content[member.offset : end_of(member)]
                assert xxhash.xxh3_64(payload).hexdigest() == member.xxh3
                read.append(safetensors.torch.load(payload))
    assert_same(joined(read), latents)


def test_stock_webdataset_reads_the_same_tensors(write_set: WriteSet) -> None:
    latents = write_set(29, dtype="bfloat16")
    urls = [str(latents.folder / shard.name) for shard in latents.manifest.shards]
    records = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [record["__key__"] for record in records] == [f"{i:08d}" for i in range(8)]
    assert_same(joined([safetensors.torch.load(record["safetensors"]) for record in records]), latents)


def test_the_caller_may_reuse_its_tensors(tmp_path: Path) -> None:
    folder, buffer = Location(tmp_path / "set"), ONE.clone()
    with writer_in(folder, samples_per_member=8) as writer:
        for i in range(3):
            buffer.fill_(i)
            writer.add(buffer, ints(i), ints(0))
    manifest, _ = read_manifest(str(folder))  # leaving the block closed it
    assert read_member(folder, manifest, 0, 0)["latents"][:, 0, 0, 0, 0].tolist() == [0, 1, 2]


NAN = ONE.clone().index_fill_(2, ints(0), torch.nan)


@pytest.mark.parametrize(
    ("latents", "ids", "labels", "message"),
    [
        (ONE.double(), ints(9), ints(0), "float32, not .* in torch.float64"),
        (ONE[0], ints(9), ints(0), r"\['K', 2, 1, 3, 3\]"),
        (torch.ones(1, 4, 1, 3, 3), ints(9), ints(0), r"not \[1, 4, 1, 3, 3\]"),
        (torch.ones(2, 1, 3, 3), ints(9, 10), ints(0, 0), r"not \[2, 1, 3, 3\]"),
        (ONE, ints(9, 10), ints(0), r"ids must be int64 \[1\]"),
        (ONE, ints(9).int(), ints(0), "ids must be int64"),
        (ONE, ints(9), ints(0)[:, None], "labels must be int64"),
        (ONE, ints(9), torch.tensor([0.0]), "labels must be int64"),
        (torch.cat([ONE, NAN]), ints(9, 10), ints(0, 0), "id 10 is not finite"),
        (torch.cat([ONE, ONE / 0]), ints(9, 10), ints(0, 0), "id 10 is not finite"),
        (ONE, ints(9), ints(3), "id 9 has label 3"),
        (ONE, ints(9), ints(-2), "id 9 has label -2"),
        (ONE, ints(3), ints(0), "two samples have the id 3"),
        (torch.cat([ONE, ONE]), ints(9, 9), ints(0, 0), "two samples have the id 9"),
        (ONE, ints(-9), ints(0), "id -9 is negative"),
    ],
)
def test_bad_samples_are_refused_and_nothing_is_left(
    tmp_path: Path, latents: Tensor, ids: Tensor, labels: Tensor, message: str
) -> None:
    folder = Location(tmp_path)
    writer = writer_in(folder)
    writer.add(ONE.expand(8, -1, -1, -1, -1), torch.arange(8), torch.full((8,), -1))
    assert folder.names() == ["shard-000000.tar", "shard-000001.tar"]
    with pytest.raises(DataError, match=message):
        writer.add(latents, ids, labels)
    assert folder.names() == []
    with pytest.raises(RuntimeError, match="closed"):
        writer.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (0, 1, 3, 3)}, "shape"),
        ({"codec": CodecRecord(name="x", location="x", scale=(1.0,) * 3)}, "1 or 2 entries"),
    ],
)
def test_an_impossible_set_is_refused_before_anything_is_encoded(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        writer_in(Location(tmp_path), **changes)


@pytest.mark.parametrize("name", [MANIFEST_NAME, "shard-000007.tar"])
def test_a_folder_in_use_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=f"already contains {name}: choose another folder"):
        writer_in(Location(tmp_path))
    assert (tmp_path / name).read_bytes() == b"x"


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no samples"):
        writer_in(Location(tmp_path)).close()
    assert list(tmp_path.iterdir()) == []


def test_an_error_around_the_writer_removes_its_shards_and_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("kept")
    with pytest.raises(KeyboardInterrupt), writer_in(Location(tmp_path)) as writer:
        writer.add(ONE.expand(5, -1, -1, -1, -1), torch.arange(5), torch.zeros(5, dtype=torch.int64))
        assert Location(tmp_path).names() == ["notes.txt", "shard-000000.tar"]
        raise KeyboardInterrupt
    assert Location(tmp_path).names() == ["notes.txt"]


@pytest.mark.parametrize("name", ["file", "file/set"])
def test_a_folder_that_cannot_be_written_is_a_data_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot write to"):
        writer_in(Location(tmp_path / name)).add(ONE.expand(4, -1, -1, -1, -1), torch.arange(4), ints(0, 0, 0, 0))
    assert (tmp_path / "file").read_text() == "in the way"


def test_closing_twice_gives_the_same_manifest(tmp_path: Path) -> None:
    writer = writer_in(Location(tmp_path))
    writer.add(ONE, ints(1), ints(1))
    assert writer.close() is writer.close()


# Damage


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def end_of(member: TarMember) -> int:
    return member.offset + member.bytes


def swap_members(latents: LatentSet, content: bytes) -> bytes:
    one, two = latents.manifest.shards[0].members[:2]
    assert one.bytes == two.bytes
    payloads = [content[m.offset : end_of(m)] for m in (one, two)]
    swapped = bytearray(content)
    swapped[one.offset : end_of(one)] = payloads[1]
    swapped[two.offset : end_of(two)] = payloads[0]
    return bytes(swapped)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s, c: flip(c, s.manifest.shards[0].members[1].offset), "not what was written"),
        (lambda s, c: flip(c, end_of(s.manifest.shards[0].members[1]) - 1), "not what was written"),
        (lambda s, c: c[: s.manifest.shards[0].members[1].offset - 512], "bytes instead of"),
        (lambda s, c: c[: s.manifest.shards[0].members[1].offset + 100], "bytes instead of"),
        (lambda s, c: b"", "0 bytes instead of"),
        (swap_members, "not what was written"),
        (lambda s, c: None, "is missing"),
    ],
    ids=["first byte", "last byte", "cut at a member", "cut within", "empty", "swapped", "removed"],
)
@pytest.mark.parametrize("where", ["local", "memory"])
def test_damage_is_named(
    write_set: WriteSet, memory: Location, where: str, damage: Callable[[LatentSet, bytes], bytes | None], message: str
) -> None:
    latents = write_set(29, place=memory if where == "memory" else None)
    place = latents.folder / "shard-000000.tar"
    content = damage(latents, place.read())
    if content is None:
        place.remove()
    else:
        place.write(content)
    with pytest.raises(DataError, match=message) as raised:
        read_member(latents.folder, latents.manifest, 0, 1)
    assert str(place) in str(raised.value) and "again" in str(raised.value)
    assert content is None or "00000001.safetensors" in str(raised.value)
    read_member(latents.folder, latents.manifest, 1, 0)  # the other shards are as they were


def test_a_shard_cut_short_is_described_by_expected_and_found_bytes(write_set: WriteSet) -> None:
    latents = write_set(29)
    place = latents.folder / "shard-000002.tar"
    place.write(place.read()[:1000])
    with pytest.raises(DataError, match=f"1000 bytes instead of {latents.manifest.shards[2].bytes}"):
        read_member(latents.folder, latents.manifest, 2, 1)


GOOD = {"latents": torch.zeros(4, 2, 1, 3, 3), "ids": torch.arange(4), "labels": torch.zeros(4, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x" * 400, "not a safetensors file"),
        (b"\xff" * 400, "not a safetensors file"),
        (safetensors.torch.save({"latents": GOOD["latents"], "ids": GOOD["ids"]}), "holds .*instead of"),
        (safetensors.torch.save(GOOD | {"more": GOOD["ids"].clone()}), "more"),
        (safetensors.torch.save(GOOD | {"ids": torch.arange(3)}), r"ids \[3\]"),
        (safetensors.torch.save(GOOD | {"ids": torch.arange(4.0)}), "ids .*float32"),
        (safetensors.torch.save(GOOD | {"latents": GOOD["latents"].half()}), "latents .*float16"),
        (safetensors.torch.save(GOOD | {"latents": torch.zeros(4, 2, 3, 1, 3)}), r"latents \[4, 2, 3, 1, 3\]"),
        (safetensors.torch.save(GOOD | {"labels": torch.tensor([0, 1, 2, 3])}), "labels from 0 to 3"),
        (safetensors.torch.save(GOOD | {"labels": torch.tensor([0, 1, 2, -2])}), "labels from -2 to 2"),
        (
            b'\x40\0\0\0\0\0\0\0{"ids":{"dtype":"Q7","shape":[4],"data_offsets":[0,32]}}         ' + b"\0" * 392,
            "not a s",
        ),
    ],
)
def test_a_forged_member_with_a_good_checksum_is_refused(write_set: WriteSet, content: bytes, message: str) -> None:
    """The manifest is untrusted, too: its checksum proves nothing about the content of the member."""
    latents = write_set(4)
    member = latents.manifest.shards[0].members[0]
    place = latents.folder / "shard-000000.tar"
    shard = place.read()
    content = content.ljust(4 * latents.manifest.sample_bytes(latents.manifest.shape), b" ")
    place.write(shard[: member.offset] + content + shard[member.offset + len(content) :])
    tree = json.loads((latents.folder / MANIFEST_NAME).read())
    checksum = xxhash.xxh3_64(content).hexdigest()
    tree["shards"][0]["members"][0] |= {"bytes": len(content), "xxh3": checksum}
    (latents.folder / MANIFEST_NAME).write(json.dumps(tree).encode())
    manifest, folder = read_manifest(latents.url)
    with pytest.raises(DataError, match=message):
        read_member(folder, manifest, 0, 0)
