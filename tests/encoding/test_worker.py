"""One rank's share of a job: what it loads ahead, counts, rejects and writes."""

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from rdm_scale.codecs import load_codec, normalize
from rdm_scale.encoding.job import EncodingJob
from rdm_scale.encoding.planning import EncodingPlan, PlannedShard, make_plan
from rdm_scale.encoding.records import ShardRecord
from rdm_scale.encoding.worker import StageTrace, Worker, no_trace
from rdm_scale.errors import DataError
from tests.support.encoding_jobs import make_job, png, write_digits
from tests.support.limits import HANG_S


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, 40)
    return folder


def run(
    job: EncodingJob, progress: Callable[[int], object] = lambda samples: None, trace: StageTrace = no_trace
) -> tuple[EncodingPlan, dict[PlannedShard, ShardRecord]]:
    plan = make_plan(job.source, job.settings, None)
    records: dict[PlannedShard, ShardRecord] = {}
    Worker(job, trace).run(plan.shards, records.__setitem__, progress)
    return plan, records


def test_members_are_numbered_over_all_shards_and_progress_adds_up(digits: Path, tmp_path: Path) -> None:
    done: list[int] = []
    plan, records = run(make_job(digits, tmp_path), done.append)
    assert list(records) == list(plan.shards)
    names = [[member.name for member in record.shard.members] for record in records.values()]
    assert names == [[f"{3 * s + m:08d}.safetensors" for m in range(3 if s < 3 else 1)] for s in range(4)]
    assert [record.shard.name for record in records.values()] == [f"shard-{s:06d}.tar" for s in range(4)]
    assert done == [7, 5, 7, 5, 7, 5, 4]  # batches end with their shards
    assert {path.name for path in tmp_path.iterdir()} == {f"shard-{s:06d}.tar" for s in range(4)}


def test_no_more_than_three_batches_are_in_memory(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, used, most = 0, 0, 0
    lock = threading.Lock()

    def trace(stage: str) -> nullcontext[None]:
        nonlocal begun
        with lock:
            begun += stage == "load"
        return nullcontext()

    job = make_job(digits, tmp_path, batch_size=4)
    real_encode = job.codec.encode

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        nonlocal used, most
        deadline = time.monotonic() + HANG_S
        while begun < min(40, used + 12) and time.monotonic() < deadline:  # the reading threads may be slow
            time.sleep(0.01)
        time.sleep(0.01)  # time to begin too many
        most = max(most, begun - used)
        used += len(pixels)
        return real_encode(pixels)

    monkeypatch.setattr(job.codec, "encode", encode)
    run(job, trace=trace)
    assert used == 40 and most == 3 * 4


def test_every_stage_is_traced_in_its_own_thread(digits: Path, tmp_path: Path) -> None:
    entered: dict[str, set[str]] = {}
    counts: dict[str, int] = {}
    lock = threading.Lock()

    def trace(stage: str) -> nullcontext[None]:
        with lock:
            entered.setdefault(stage, set()).add(threading.current_thread().name.split("_")[0])
            counts[stage] = counts.get(stage, 0) + 1
        return nullcontext()

    run(make_job(digits, tmp_path), trace=trace)
    own = threading.current_thread().name.split("_")[0]
    assert entered == {
        "load": {"pixels"},
        "collate": {"batches"},
        "wait": {own},
        "encode": {own},
        "statistics": {own},
        "write": {"shards"},
    }
    assert (counts["load"], counts["collate"], counts["encode"], counts["write"]) == (40, 7, 7, 4)
    assert counts["wait"] == 7 + 4  # for each batch, and for each shard


def test_undecodable_samples_are_left_out_and_recorded(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for i in range(12):
        (source / f"{i}.png").write_bytes(png(np.full((8, 8, 3), 20 * i, np.uint8)))
    job = make_job(source, tmp_path / "out", members_per_shard=2)  # shards of 8 and 4
    plan = make_plan(job.source, job.settings, None)
    name = [file.name for file in job.source.files]
    bad = [plan.shards[0].samples[3].file, *(sample.file for sample in plan.shards[1].samples)]
    for index in bad:
        (source / name[index].rsplit("/")[-1]).write_bytes(b"no image")
    first, second = run(make_job(source, tmp_path / "out", members_per_shard=2))[1].values()
    ((position, reason, cause),) = first.rejected
    assert position == 3 and cause == "content" and name[bad[0]] in reason and "it is not a PNG, JPEG or WebP" in reason
    assert first.shard.samples == 7 and [member.samples for member in first.shard.members] == [4, 3]
    assert second.shard is None and [one.position for one in second.rejected] == [0, 1, 2, 3] and second.count == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["shard-000000.tar"]


def test_recorded_moments_are_those_of_draws_from_the_posterior(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(digits, tmp_path, size=32, codec="digits", kind="moments")
    encoded: list[torch.Tensor] = []

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(len(encoded))
        encoded.append(torch.randn(len(pixels), 8, 1, 8, 8, generator=generator))
        return encoded[-1]

    monkeypatch.setattr(job.codec, "encode", encode)
    records = run(job)[1].values()
    count, total, squares = (sum(getattr(record, name) for record in records) for name in ("count", "total", "squares"))
    mean, log_variance = torch.cat(encoded).double().chunk(2, 1)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, *mean.shape, generator=generator, dtype=torch.float64)
    drawn = normalize((mean + (0.5 * log_variance).exp() * noise).flatten(0, 1), load_codec("digits").record)
    assert count == mean.numel()
    assert total / count == pytest.approx(drawn.mean().item(), abs=0.01)
    assert squares / count - (total / count) ** 2 == pytest.approx(drawn.var().item(), rel=0.01)


def test_latents_beyond_the_range_of_their_dtype(digits: Path, tmp_path: Path) -> None:
    job = make_job(digits, tmp_path / "half", size=32, codec="digits", dtype="float16")
    job.codec.encode = lambda pixels: torch.full((len(pixels), 8, 1, 8, 8), 1e6)
    with pytest.raises(DataError, match=r"\.png to latents that are not finite in float16: use --dtype float32"):
        run(job)
    assert not (tmp_path / "half").exists()
    wide = make_job(digits, tmp_path / "single", size=32, codec="digits", dtype="bfloat16")
    wide.codec.encode = job.codec.encode
    assert len(run(wide)[1]) == 4


def test_an_unwritable_folder_ends_the_run_and_its_threads(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    before = threading.active_count()
    with pytest.raises(OSError):
        run(make_job(digits, tmp_path / "file"))
    assert threading.active_count() == before
