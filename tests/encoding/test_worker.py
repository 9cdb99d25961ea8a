"""One rank's part: what it loads ahead, counts, rejects and writes."""

import threading

import numpy as np
import pytest
import torch

from rdm_scale.codecs import load_codec, normalize
from rdm_scale.encoding import worker
from rdm_scale.encoding.planning import make_plan
from rdm_scale.encoding.worker import Statistics, Worker
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location
from tests.support.encoding_jobs import make_job, png, write_digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, 40)
    return folder


def run(job, progress=lambda samples: None):
    plan = make_plan(job.source, job.settings, None)
    records = {}
    made = Worker(job.source, job.settings, job.codec, job.text, job.folders.__getitem__)
    made.run(plan.shards, records.__setitem__, progress)
    return plan, records


def test_members_are_numbered_over_all_shards_and_progress_adds_up(digits, tmp_path):
    done = []
    plan, records = run(make_job(digits, tmp_path), done.append)
    assert list(records) == list(plan.shards)
    names = [[member.name for member in record.shard.members] for record in records.values()]
    assert names == [[f"{3 * s + m:08d}.safetensors" for m in range(3 if s < 3 else 1)] for s in range(4)]
    assert [record.shard.name for record in records.values()] == [f"shard-{s:06d}.tar" for s in range(4)]
    assert done == [7, 5, 7, 5, 7, 5, 4]  # batches end with their shards
    assert {path.name for path in tmp_path.iterdir()} == {f"shard-{s:06d}.tar" for s in range(4)}


def test_no_more_than_three_batches_are_in_memory(digits, tmp_path, monkeypatch):
    begun, used, most = 0, 0, 0
    lock, real_load = threading.Lock(), worker.load

    def load(*arguments):
        nonlocal begun
        with lock:
            begun += 1
        return real_load(*arguments)

    monkeypatch.setattr(worker, "load", load)
    job = make_job(digits, tmp_path, batch_size=4)
    real_encode = job.codec.encode

    def encode(pixels):
        nonlocal used, most
        most = max(most, begun - used)
        used += len(pixels)
        return real_encode(pixels)

    monkeypatch.setattr(job.codec, "encode", encode)
    run(job)
    assert used == 40 and 4 < most <= 3 * 4


def test_what_cannot_be_decoded_is_left_out_and_told(digits, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for i in range(12):
        (source / f"{i}.png").write_bytes(png(np.full((8, 8, 3), 20 * i, np.uint8)))
    job = make_job(source, tmp_path / "out", members_per_shard=2)  # shards of 8 and 4
    plan = make_plan(job.source, job.settings, None)
    name = [file.name for file in job.source.files]
    bad = [plan.shards[0].items[3].file, *(item.file for item in plan.shards[1].items)]
    for index in bad:
        (source / name[index].rsplit("/")[-1]).write_bytes(b"no image")
    first, second = run(job)[1].values()
    ((item, reason),) = first.rejected
    assert item == 3 and name[bad[0]] in reason and "cannot decode" in reason
    assert first.shard.samples == 7 and [member.samples for member in first.shard.members] == [4, 3]
    assert second.shard is None and [one.item for one in second.rejected] == [0, 1, 2, 3] and second.count == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["shard-000000.tar"]


def test_statistics_are_those_of_draws_from_the_posterior():
    record = load_codec("digits").record
    moments = torch.randn(50, 8, 1, 8, 8)
    statistics = Statistics()
    statistics.add(moments[:20], record, "moments")
    statistics.add(moments[20:], record, "moments")
    mean, log_variance = moments.double().chunk(2, 1)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, *mean.shape, generator=generator, dtype=torch.float64)
    drawn = normalize((mean + (0.5 * log_variance).exp() * noise).flatten(0, 1), record)
    assert statistics.count == mean.numel()
    found = statistics.total / statistics.count
    assert found == pytest.approx(drawn.mean().item(), abs=0.01)
    variance = statistics.squares / statistics.count - found**2
    assert variance == pytest.approx(drawn.var().item(), rel=0.01)


def test_latents_beyond_the_range_of_their_dtype(digits, tmp_path):
    job = make_job(digits, tmp_path / "half", size=32, codec="digits", dtype="float16")
    job.codec.encode = lambda pixels: torch.full((len(pixels), 8, 1, 8, 8), 1e6)
    with pytest.raises(DataError, match=r"\.png that are not finite in float16: encode with --dtype float32"):
        run(job)
    assert not (tmp_path / "half").exists()
    wide = make_job(digits, tmp_path / "single", size=32, codec="digits", dtype="bfloat16")
    wide.codec.encode = job.codec.encode
    assert len(run(wide)[1]) == 4


def test_a_folder_that_cannot_be_written_ends_it(digits, tmp_path):
    (tmp_path / "file").write_text("")
    job = make_job(digits, tmp_path / "out")
    made = Worker(job.source, job.settings, job.codec, None, lambda side: Location(tmp_path / "file"))
    before = threading.active_count()
    with pytest.raises(OSError):
        made.run(make_plan(job.source, job.settings, None).shards, lambda *record: None, lambda samples: None)
    assert threading.active_count() == before
