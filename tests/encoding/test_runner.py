"""Complete jobs in one process: what they write, against plain encodings of the same files, and how they resume."""

import re
import shutil

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from rdm_scale import rng
from rdm_scale.codecs import load_codec, normalize
from rdm_scale.data.captions import unpack_text
from rdm_scale.data.manifest import read_manifest
from rdm_scale.data.shard_writer import sample_id
from rdm_scale.data.shards import read_bytes, read_member
from rdm_scale.dtypes import STORED_DTYPES
from rdm_scale.encoding.job import ProcessRank
from rdm_scale.encoding.output import OutputFolders
from rdm_scale.encoding.planning import PixelBucket
from rdm_scale.encoding.runner import encode
from rdm_scale.encoding.text import TextEncoder
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location
from tests.support.clip_files import BUNNY, all_frames
from tests.support.encoding_jobs import (
    CLIP_FRAMES,
    assert_done,
    contents,
    ids_of,
    make_job,
    pixels_of,
    png,
    read_all,
    stop_after,
    write_digits,
)

COUNT = 60


@pytest.fixture(scope="module")
def large_digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large_digits")
    write_digits(folder, 20, size=32)
    return folder


# ---- what is written


def test_every_image_is_there_once_in_keyed_order(digits, tmp_path):
    told = []
    encoded = encode(make_job(digits, tmp_path / "out", seed=3), progress=lambda *one: told.append(one))
    manifest, data = read_all(tmp_path / "out")
    assert encoded.train == manifest and encoded.holdout is None and encoded.truncated == 0
    assert (manifest.kind, manifest.dtype, manifest.shape) == ("mode", "float32", (3, 1, 8, 8))
    assert manifest.class_names == tuple("0123456789") and manifest.samples == COUNT and manifest.rejected == 0
    by_id = ids_of(digits)
    order = sorted(by_id.values(), key=lambda p: rng.key(3, "shuffle", f"{p.parent.name}/{p.stem}", 0, 0))
    assert [by_id[i] for i in data["ids"].tolist()] == order
    expected = torch.stack([pixels_of(path) for path in order])
    assert torch.equal(data["latents"], expected)
    assert data["labels"].tolist() == [int(path.parent.name) for path in order]
    assert encoded.mean == pytest.approx(expected.mean().item(), abs=1e-5)
    assert encoded.std == pytest.approx(expected.std(correction=0).item(), abs=1e-5)
    assert told[-1] == ("encoding", COUNT, COUNT) and {stage for stage, _, _ in told} == {"encoding"}
    assert_done(tmp_path / "out")


@pytest.mark.parametrize("dtype", STORED_DTYPES)
@pytest.mark.parametrize("kind", ["mode", "moments"])
def test_latents_are_those_of_a_plain_encoding(large_digits, tmp_path, kind, dtype):
    encoded = encode(make_job(large_digits, tmp_path / "out", 32, codec="digits", kind=kind, dtype=dtype))
    manifest, data = read_all(tmp_path / "out")
    codec, by_id = load_codec("digits"), ids_of(large_digits)
    plain = codec.encode(torch.stack([pixels_of(by_id[i]) for i in data["ids"].tolist()]))
    expected = (plain if kind == "moments" else plain[:, :4]).to(STORED_DTYPES[dtype].torch)
    assert (manifest.kind, manifest.dtype, manifest.shape) == (kind, dtype, (4, 1, 8, 8))
    assert manifest.codec == codec.record
    # other batches: the last bits may differ
    torch.testing.assert_close(data["latents"], expected, rtol=1e-2 if dtype == "bfloat16" else 2e-3, atol=1e-4)
    unit = normalize(data["latents"][:, :4].double(), codec.record)
    assert encoded.mean == pytest.approx(unit.mean().item(), abs=1e-6)
    variance = unit.var(correction=0)
    if kind == "moments":  # of samples: that of the means and the mean posterior variance
        scale = torch.tensor(codec.record.scale, dtype=torch.float64).view(-1, 1, 1, 1)
        variance = variance + (data["latents"][:, 4:].double().exp() * scale**2).mean()
    assert encoded.std == pytest.approx(variance.sqrt().item(), rel=1e-6)


def test_flips_are_second_views_with_ids_of_their_own(digits, tmp_path):
    encode(make_job(digits / "3", tmp_path / "out", flips=True))
    _, data = read_all(tmp_path / "out")
    latents = dict(zip(data["ids"].tolist(), data["latents"], strict=True))
    plain, mirrored = ids_of(digits / "3"), ids_of(digits / "3", view=1)
    assert len(latents) == 2 * len(plain) and latents.keys() == plain.keys() | mirrored.keys()
    for number, path in plain.items():
        assert torch.equal(latents[number], pixels_of(path))
    for number, path in mirrored.items():
        assert torch.equal(latents[number], pixels_of(path).flip(3))


def test_held_out_samples_go_to_their_own_folder(digits, tmp_path):
    encoded = encode(make_job(digits, tmp_path / "out", holdout=tmp_path / "held"))
    (train, data), (held, held_data) = read_all(tmp_path / "out"), read_all(tmp_path / "held")
    assert (encoded.train, encoded.holdout) == (train, held) and train.class_names == held.class_names
    expected = {
        number
        for number, p in ids_of(digits).items()
        if rng.key(0, "holdout", f"{p.parent.name}/{p.stem}") < 0.3 * 2**63
    }
    assert set(held_data["ids"].tolist()) == expected and 8 < len(expected) < 30
    assert set(data["ids"].tolist()) == ids_of(digits).keys() - expected
    assert encoded.mean == pytest.approx(data["latents"].mean().item(), abs=1e-5)
    assert_done(tmp_path / "out")
    assert_done(tmp_path / "held")
    (tmp_path / "held/manifest.json").unlink()
    assert not OutputFolders(Location(tmp_path / "out"), Location(tmp_path / "held")).check(encoded.train.job)


def test_captions_lie_beside_their_samples(digits, tmp_path):
    from tests.support.text_encoders import bert_folder  # imports transformers

    source = tmp_path / "in"
    shutil.copytree(digits / "7", source)
    captions = {}
    for number, path in ids_of(source).items():
        captions[number] = f"a seven {path.stem} of {'many ' * (path.stat().st_size % 60)}words"
        path.with_suffix(".txt").write_text(captions[number])
    encoder = TextEncoder(bert_folder(tmp_path / "bert"))
    encoded = encode(
        make_job(source, tmp_path / "out", text=encoder, dtype="float16", samples_per_member=2, members_per_shard=2)
    )
    manifest, folder = read_manifest(str(tmp_path / "out"))
    assert len(manifest.shards) > 1
    plain = TextEncoder(str(tmp_path / "bert"))
    for shard_index, shard in enumerate(manifest.shards):
        assert shard.text.name == shard.name.replace("shard", "text")
        assert [m.name for m in shard.text.members] == [m.name for m in shard.members]
        for number, member in enumerate(shard.members):
            ids = read_member(folder, manifest, shard_index, number)["ids"]
            text = unpack_text(read_bytes(folder, shard.text, number), member.samples, 16, 16, torch.float16)
            assert torch.equal(text.ids, ids)
            for k, one in enumerate(plain.encode([captions[i] for i in ids.tolist()])):
                tokens = text.tokens[text.offsets[k] : text.offsets[k + 1]].float()
                torch.testing.assert_close(tokens, one.tokens, rtol=1e-3, atol=2e-3)
                torch.testing.assert_close(text.pooled[k].float(), one.pooled, rtol=1e-3, atol=2e-3)
    assert encoded.truncated == plain.truncated > 0
    assert manifest.text.max_tokens == 40 and manifest.text.digest == encoder.record.digest
    assert_done(tmp_path / "out")


def test_each_bucket_has_shards_of_its_own(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    generator = np.random.default_rng(0)
    for i in range(30):
        size = [(16, 16), (16, 32), (32, 16)][i % 3]
        (source / f"{i}.png").write_bytes(png(generator.integers(0, 256, (*size, 3), np.uint8)))
    buckets = (PixelBucket(1, 8, 8), PixelBucket(1, 8, 16), PixelBucket(1, 16, 8))
    told = []
    encode(make_job(source, tmp_path / "out", buckets=buckets), progress=lambda *one: told.append(one))
    manifest, folder = read_manifest(str(tmp_path / "out"))
    assert set(manifest.buckets) == {(3, 1, 8, 8), (3, 1, 8, 16), (3, 1, 16, 8)}
    assert manifest.shape == (3, 1, 8, 8) and [len(indices) for indices in manifest.buckets.values()] == [1, 1, 1]
    by_id = ids_of(source)
    for index, shard in enumerate(manifest.shards):
        _, _, height, width = manifest.shape_of(shard)
        found = [read_member(folder, manifest, index, m) for m in range(len(shard.members))]
        for number in torch.cat([member["ids"] for member in found]).tolist():
            assert Image.open(by_id.pop(number)).size == (2 * width, 2 * height)
    assert not by_id and told[29] == ("looking", 30, 30) and told[-1] == ("encoding", 30, 30)


def test_clips_of_digits_and_of_a_real_video(clips, tmp_path):
    encode(make_job(clips, tmp_path / "digits", 32, frames=4))
    manifest, data = read_all(tmp_path / "digits")
    assert manifest.shape == (3, 4, 32, 32) and manifest.samples == 5 * (CLIP_FRAMES // 4)
    latents = dict(zip(data["ids"].tolist(), data["latents"], strict=True))
    for clip in range(2):
        for number, path in ids_of(clips, "mp4", clip).items():
            expected = all_frames(path.read_bytes())[:, 4 * clip : 4 * clip + 4]
            torch.testing.assert_close(latents[number], expected, rtol=0, atol=2.1 / 127.5)

    (tmp_path / "bunny").mkdir()
    shutil.copy(BUNNY, tmp_path / "bunny/bunny.mp4")
    encode(make_job(tmp_path / "bunny", tmp_path / "real", 16, frames=6, stride=2, fps=12.5, dtype="bfloat16"))
    manifest, data = read_all(tmp_path / "real")
    # 2 s at 12.5 frames a second are 25; a clip takes 11 of them and the next one begins 12 later
    assert manifest.samples == 2 and manifest.shape == (3, 6, 16, 16)
    assert set(data["ids"].tolist()) == {sample_id("bunny", 0), sample_id("bunny", 1)}
    second = data["latents"][data["ids"].tolist().index(sample_id("bunny", 1))].float()
    frames = all_frames(BUNNY.read_bytes())[:, 24 : 24 + 6 * 4 : 4, :, 70:250]  # 12.5 a second, stride 2, the middle
    coarse = torch.nn.functional.interpolate(frames.transpose(0, 1), (16, 16), mode="bicubic", antialias=True)
    assert (second - coarse.transpose(0, 1)).abs().mean() < 0.02


# ---- resumed


def test_an_interrupted_job_is_resumed(digits, tmp_path, monkeypatch):
    encode(make_job(digits, tmp_path / "whole", holdout=tmp_path / "whole_held"))
    job = make_job(digits, tmp_path / "out", holdout=tmp_path / "held")
    with pytest.raises(KeyboardInterrupt):
        encode(job, progress=stop_after(job, 2))
    records = sorted(path.name for path in (tmp_path / "out/.encoding").glob("train-*"))
    assert records and not (tmp_path / "out/manifest.json").exists()
    # files of a process that is killed while it writes
    (tmp_path / "out/shard-000001.tar.partial-123").write_bytes(b"half")
    (tmp_path / "held/text-000000.tar.partial-9").parent.mkdir(exist_ok=True)
    (tmp_path / "held/text-000000.tar.partial-9").write_bytes(b"half")
    (tmp_path / "out/.encoding/train-000001-0123456789ab.json.partial-123").write_bytes(b"half")
    assert not job.output.check(job.digest)
    encoded_again = []
    real = job.codec.encode
    monkeypatch.setattr(job.codec, "encode", lambda pixels: encoded_again.append(len(pixels)) or real(pixels))
    encode(job)
    assert sum(encoded_again) == COUNT - 12 * len(records)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert contents(tmp_path / "held") == contents(tmp_path / "whole_held")
    assert job.output.check(job.digest)


def test_ranks_one_after_the_other_make_the_same_bytes(digits, tmp_path):
    encode(make_job(digits, tmp_path / "whole"))
    job = make_job(digits, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):  # the first one has made the plan
        encode(job, ProcessRank(0, 3), progress=lambda *told: (_ for _ in ()).throw(KeyboardInterrupt))
    assert [encode(job, ProcessRank(rank, 3)) for rank in (1, 2)] == [None, None]
    plan = (tmp_path / "out/.encoding/plan.json").read_bytes()
    assert (len(list((tmp_path / "out").glob("shard-*"))), encode(job, ProcessRank(0, 3)).train.samples) == (3, COUNT)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    # a rank that comes when all is done, or has just read the plan then
    job.codec.encode = None
    assert encode(job, ProcessRank(2, 3)) is None
    (tmp_path / "out/.encoding/plan.json").write_bytes(plan)
    assert encode(job, ProcessRank(2, 3)) is None
    shutil.rmtree(tmp_path / "out/.encoding")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# ---- refused


def test_sizes_that_do_not_fit_the_codec(digits, tmp_path):
    with pytest.raises(DataError, match=r"30 x 30 pixels do not fit the codec digits: .* multiples of 4"):
        encode(make_job(digits, tmp_path / "out", 30, codec="digits"))
    assert not (tmp_path / "out").exists()


# ---- other file systems


def test_input_and_output_in_memory(digits, memory, tmp_path):
    fs = fsspec.filesystem("memory")
    for path in digits.rglob("*.png"):
        fs.pipe_file(f"{memory.path}/in/{path.relative_to(digits)}", path.read_bytes())
    encode(make_job(digits, tmp_path / "out"))
    job = make_job(f"memory:/{memory.path}/in", f"memory:/{memory.path}/out")
    with pytest.raises(KeyboardInterrupt):
        encode(job, progress=stop_after(job, 2))
    encode(job)
    assert job.output.check(job.digest)
    found = {path.rsplit("/", 1)[-1]: fs.cat_file(path) for path in fs.ls(f"{memory.path}/out", detail=False)[1:]}
    assert found == contents(tmp_path / "out")
    with pytest.raises(DataError, match=re.escape(f"{job.output.train} already holds encoded data")):
        job.output.check("another")
