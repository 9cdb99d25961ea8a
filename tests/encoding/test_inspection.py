"""Damage of every kind is found and named, statistics are those of numpy, and pictures are of the right samples."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch

from rdm_scale.codecs import load_codec
from rdm_scale.data.captions import EncodedText, pack_text
from rdm_scale.data.manifest import ChannelStatistics, Manifest, TextEncoding, read_manifest
from rdm_scale.data.shard_writer import PackedMember, pack_samples, write_tar
from rdm_scale.encoding.inspection import decode_samples, measure_statistics, verify
from rdm_scale.encoding.planning import PixelBucket
from rdm_scale.encoding.runner import encode
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location
from tests.support.encoding_jobs import contents, ids_of, make_job, pixels_of, png, read_all, write_clips

COUNT = 30


@pytest.fixture(scope="module")
def encoded(digits, tmp_path_factory):
    """Shards of 12, 12 and 6 samples in members of 4, with captions: of sample i the token [i, i]."""
    out = tmp_path_factory.mktemp("encoded") / "out"
    encode(make_job(digits, out))
    manifest, folder = read_manifest(str(out))
    rewrite(folder, manifest, lambda shard, member, samples, text: None)
    return out


@pytest.fixture
def copy(encoded, tmp_path):
    return shutil.copytree(encoded, tmp_path / "copy")


def rewrite(folder, manifest, change) -> Manifest:
    """Writes all shards again after change(shard, member, samples, text ids), with right checksums and captions."""
    shards = []
    for s, shard in enumerate(manifest.shards):
        members, texts = [], []
        for m, member in enumerate(shard.members):
            content = (folder / shard.name).read_range(member.offset, member.bytes)
            samples = safetensors.torch.load(content)
            ids = samples["ids"].clone()
            change(s, m, samples, ids)
            members.append(PackedMember(member.name, len(ids), pack_samples(**samples)))
            captions = [EncodedText(torch.full((1, 2), float(i % 1000)), torch.zeros(3)) for i in ids.tolist()]
            texts.append(PackedMember(member.name, len(ids), pack_text(captions, ids, torch.float32)))
        text = write_tar(folder, f"text-{s:06d}.tar", texts)
        shards.append(shard.model_copy(update={**dict(write_tar(folder, shard.name, members)), "text": text}))
    encoding = TextEncoding(
        encoder="x", location="x", digest="x", width=2, pooled_width=3, max_tokens=1, dtype="float32", empty=""
    )
    changed = manifest.model_copy(update={"shards": tuple(shards), "text": encoding})
    (folder / "manifest.json").write(changed.to_json())
    return changed


def test_nothing_is_found_where_nothing_is_wrong(encoded, digits, tmp_path):
    seen = []
    manifest, faults = verify(str(encoded), seen.append)
    assert faults == [] and manifest.samples == sum(seen) == COUNT and manifest.text
    encode(make_job(digits, tmp_path / "plain"))
    assert verify(str(tmp_path / "plain/manifest.json"))[1] == []


@pytest.mark.parametrize(("name", "member"), [("shard-000001.tar", 2), ("text-000001.tar", 0)])
def test_a_flipped_bit(copy, name, member):
    manifest, _ = read_manifest(str(copy))
    tar = manifest.shards[1] if name.startswith("shard") else manifest.shards[1].text
    content = bytearray((copy / name).read_bytes())
    content[tar.members[member].offset + tar.members[member].bytes - 1] ^= 1
    (copy / name).write_bytes(content)
    (fault,) = verify(str(copy))[1]
    assert f"member {tar.members[member].name} of {copy / name} is not what was written: its xxh3" in fault
    (copy / name).write_bytes(content[:-1] + b"\x01")  # in the padding behind the last member, too
    assert len(verify(str(copy))[1]) == 1


def test_a_flipped_bit_outside_of_members(copy):
    content = bytearray((copy / "shard-000000.tar").read_bytes())
    content[-1] ^= 1
    (copy / "shard-000000.tar").write_bytes(content)
    (fault,) = verify(str(copy))[1]
    assert f"{copy}/shard-000000.tar is not what was written: its sha256" in fault
    content[-1] ^= 1
    content[0:4] = b"abcd"  # the first member has another name, and its header a wrong checksum
    (copy / "shard-000000.tar").write_bytes(content)
    (fault,) = verify(str(copy))[1]
    assert f"{copy}/shard-000000.tar is not a tar" in fault or "name other members" in fault


@pytest.mark.parametrize("name", ["shard-000002.tar", "text-000002.tar"])
def test_missing_and_truncated_shards(copy, name):
    size = (copy / name).stat().st_size
    (copy / name).write_bytes((copy / name).read_bytes()[:-512])
    (fault,) = verify(str(copy))[1]
    assert f"{copy / name} has {size - 512} bytes, the manifest says {size}" in fault
    (copy / name).unlink()
    (fault,) = verify(str(copy))[1]
    assert f"{copy / name} is missing" in fault


def test_swapped_members(copy):
    manifest, folder = read_manifest(str(copy))
    tar = manifest.shards[0]
    contents_of = [(folder / tar.name).read_range(m.offset, m.bytes) for m in tar.members]
    names = [m.name for m in tar.members]
    order = [1, 0, 2]
    write_tar(folder, tar.name, [PackedMember(names[i], 4, contents_of[i]) for i in order])
    faults = verify(str(copy))[1]
    assert any(f"the headers in {copy / tar.name} name other members" in fault for fault in faults)
    assert sum("is not what was written" in fault for fault in faults) == 2
    # the contents alone: the tar's list is as before
    write_tar(folder, tar.name, [PackedMember(names[i], 4, contents_of[order[i]]) for i in range(3)])
    faults = verify(str(copy))[1]
    assert len(faults) == 2 and all("is not what was written: its xxh3" in fault for fault in faults)


def test_an_id_in_two_shards(copy):
    manifest, folder = read_manifest(str(copy))
    taken = read_all(copy)[1]["ids"][1].item()

    def change(shard, member, samples, text):
        if (shard, member) == (2, 1):
            samples["ids"][0] = text[0] = taken

    rewrite(folder, manifest, change)
    (fault,) = verify(str(copy))[1]
    names = [shard.members[m].name for shard, m in ((manifest.shards[0], 0), (manifest.shards[2], 1))]
    assert f"the id {taken} is in member {names[0]} of {copy}/shard-000000.tar and member {names[1]} of" in fault


def test_many_repeated_ids_make_a_short_list(copy):
    manifest, folder = read_manifest(str(copy))

    def change(shard, member, samples, text):
        for tensor in (samples["ids"], text):
            tensor.copy_((torch.arange(len(text)) + 12 * shard + 4 * member) % 12)

    rewrite(folder, manifest, change)
    faults = verify(str(copy))[1]
    assert len(faults) == 11 and faults[-1] == "2 other ids occur more than once"
    assert [fault.count(" member ") for fault in faults[:10]] == [3] * 6 + [2] * 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_though_the_checksums_are_right(copy, value):
    manifest, folder = read_manifest(str(copy))
    manifest = rewrite(
        folder, manifest, lambda s, m, samples, text: s == 1 and m == 2 and samples["latents"][3, 0, 0, 7].fill_(value)
    )
    (fault,) = verify(str(copy))[1]
    assert (
        f"member {manifest.shards[1].members[2].name} of {copy}/shard-000001.tar holds latents that are not finite"
        in fault
    )
    before = contents(copy)
    with pytest.raises(DataError, match=r"shard-000001.tar holds latents that are not finite"):
        measure_statistics(str(copy))
    assert contents(copy) == before


def test_captions_of_other_samples(copy):
    manifest, folder = read_manifest(str(copy))
    manifest = rewrite(folder, manifest, lambda s, m, samples, text: s == 0 and m == 1 and text.copy_(text.flip(0)))
    (fault,) = verify(str(copy))[1]
    assert f"member {manifest.shards[0].members[1].name} of {copy}/shard-000000.tar and its captions are of" in fault


def test_labels_and_shapes_that_the_manifest_does_not_know(copy):
    manifest, folder = read_manifest(str(copy))

    def change(shard, member, samples, text):
        if (shard, member) == (0, 0):
            samples["labels"][2] = 10
        if (shard, member) == (1, 1):
            samples["latents"] = samples["latents"].half().repeat(1, 1, 2, 1, 1)

    rewrite(folder, manifest, change)
    first, second = verify(str(copy))[1]
    assert "has labels from" in first and "to 10, and the manifest names 10 classes" in first
    assert "holds latents [4, 3, 2, 8, 8] in torch.float16" in second


def test_no_manifest(tmp_path):
    for look in (verify, measure_statistics, lambda url: decode_samples(url, load_codec("identity"), 1)):
        with pytest.raises(DataError, match="there is no manifest"):
            look(str(tmp_path))


def test_statistics_of_the_mode_are_those_of_numpy(encoded, copy):
    before, _ = read_manifest(str(copy))
    seen = []
    measured = measure_statistics(str(copy), seen.append)
    latents = read_all(copy)[1]["latents"].double().numpy()
    np.testing.assert_allclose(measured.statistics.mean, latents.mean((0, 2, 3, 4)), rtol=1e-12)
    np.testing.assert_allclose(measured.statistics.std, latents.std((0, 2, 3, 4)), rtol=1e-9)
    after, _ = read_manifest(str(copy))
    assert after == measured and after.digest == before.digest and after.job == before.job and sum(seen) == COUNT
    assert after.model_copy(update={"statistics": None}) == before
    assert {name for name, content in contents(copy).items() if content != contents(encoded)[name]} == {"manifest.json"}
    assert measure_statistics(str(copy)) == measured and verify(str(copy))[1] == []


def test_statistics_of_moments_are_of_the_posterior(copy):
    manifest, folder = read_manifest(str(copy))
    generator = torch.Generator().manual_seed(0)

    def change(shard, member, samples, text):
        samples["latents"] = torch.randn(len(text), 6, 1, 8, 8, generator=generator).contiguous()

    rewrite(folder, manifest.model_copy(update={"kind": "moments"}), change)
    measured = measure_statistics(str(copy / "manifest.json"))
    mean, log_variance = read_all(copy)[1]["latents"].double().chunk(2, 1)
    noise = torch.randn(200, *mean.shape, generator=generator, dtype=torch.float64)
    drawn = (mean + (log_variance / 2).exp() * noise).flatten(0, 1).numpy()
    assert measured.statistics == read_manifest(str(copy))[0].statistics and isinstance(
        measured.statistics, ChannelStatistics
    )
    np.testing.assert_allclose(measured.statistics.mean, drawn.mean((0, 2, 3, 4)), atol=0.01)
    np.testing.assert_allclose(measured.statistics.std, drawn.std((0, 2, 3, 4)), rtol=0.01)


def test_decoded_samples_come_from_all_over_the_set(encoded, digits):
    codec = load_codec("identity")
    by_id, ids = ids_of(digits), read_all(encoded)[1]["ids"].tolist()
    for count, wanted in ((3, [0, 10, 20]), (1, [0]), (COUNT, range(COUNT)), (1000, range(COUNT))):
        ((shape, pixels),) = decode_samples(str(encoded), codec, count).items()
        assert shape == (3, 1, 8, 8)
        assert torch.equal(pixels, torch.stack([pixels_of(by_id[ids[i]]) for i in wanted]))


def test_clips_and_buckets_are_decoded_by_their_shape(tmp_path, memory):
    write_clips(tmp_path / "in", 2)
    url = f"memory:/{memory.path}/clips"
    encode(make_job(tmp_path / "in", url, 32, codec="digits", frames=4, kind="moments"))
    ((shape, pixels),) = decode_samples(url, load_codec("digits"), 4).items()
    assert shape == (4, 4, 8, 8) and pixels.shape == (4, 3, 4, 32, 32)
    assert verify(url)[1] == [] and measure_statistics(url).statistics
    (tmp_path / "images").mkdir()
    for i in range(4):
        (tmp_path / f"images/{i}.png").write_bytes(png(np.full((8, 8 + 8 * (i % 2), 3), 60 * i, np.uint8)))
    encode(make_job(tmp_path / "images", tmp_path / "out", buckets=(PixelBucket(1, 4, 4), PixelBucket(1, 4, 8))))
    found = decode_samples(str(tmp_path / "out"), load_codec("identity"), 10)
    assert {shape: len(pixels) for shape, pixels in found.items()} == {(3, 1, 4, 4): 2, (3, 1, 4, 8): 2}
    assert sorted(pixels[0, 0, 0, 0, 0].item() for pixels in found.values())[0] < 0
    assert json.loads((tmp_path / "out/manifest.json").read_bytes())["shards"][1]["shape"] == [3, 1, 4, 8]
    # In .encoding/ are the inputs' identities, by which a repeat finds what has changed.
    assert Location(tmp_path / "out").names() == [".encoding", "manifest.json", "shard-000000.tar", "shard-000001.tar"]
