"""The same command again: what has changed is encoded again, and nothing else; other inputs are refused by name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from rdm_scale.encoding.job import EncodingJob, EncodingResult, ProcessRank
from rdm_scale.encoding.pixels import DECODING_VERSION
from rdm_scale.encoding.repeats import remaining
from rdm_scale.encoding.runner import encode
from rdm_scale.errors import DataError
from tests.support.encoding_jobs import contents, ids_of, make_job, pixels_of, png, read_all, stop_after, write_digits

COUNT = 60
CHANGED = np.full((8, 8, 3), 77, np.uint8)


@pytest.fixture
def source(digits: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(digits, tmp_path / "in"))


def rerun(job: EncodingJob) -> tuple[EncodingResult | None, list[str], int]:
    """Repeat a command in one process: its result, what it says, and how many samples it encodes."""
    lines: list[str] = []
    encoded = 0
    real = job.codec.encode

    def count(pixels: torch.Tensor) -> torch.Tensor:
        nonlocal encoded
        encoded += len(pixels)
        return real(pixels)

    job.codec.encode = count  # type: ignore[method-assign]
    if remaining(job, ProcessRank(), lines.append) == "nothing":
        return None, lines, encoded
    return encode(job, report=lines.append), lines, encoded


def assert_encodes(source: Path, out: Path) -> None:
    """The output holds the pixels that the files have now."""
    _, data = read_all(out)
    by_id = ids_of(source)
    assert len(by_id) == len(data["ids"])
    for number, latent in zip(data["ids"].tolist(), data["latents"], strict=True):
        assert torch.equal(latent, pixels_of(by_id[number]))


def levels(latents: torch.Tensor) -> set[int]:
    """All gray levels of 8 bits."""
    return set(((latents + 1) * 127.5).round().int().unique().tolist())


def test_only_shards_with_changed_images_are_encoded_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    encode(make_job(source, out))
    before = contents(out)
    result, lines, encoded = rerun(make_job(source, out))
    assert result is None and encoded == 0 and lines == [f"{out}/manifest.json: complete already, nothing to do"]
    changed = sorted(source.rglob("*.png"))[7]
    changed.write_bytes(png(CHANGED))
    result, lines, encoded = rerun(make_job(source, out))
    assert result is not None and encoded == 12 and f"1 changed ({changed}); the shards that hold" in lines[0]
    assert_encodes(source, out)
    after = contents(out)
    assert sum(after[name] != before[name] for name in before) == 2  # a shard and the manifest
    assert rerun(make_job(source, out))[0] is None


def test_pictures_of_the_latents_do_not_block_a_repeat(source: Path, tmp_path: Path) -> None:
    """`rdm-encode OUTPUT --stats` and `--decode` leave pictures in both folders."""
    out, held = tmp_path / "out", tmp_path / "held"
    job = make_job(source, out, holdout=held)
    encode(job)
    for folder in (out, held):
        for name in ("statistics.png", "decoded.png", "decoded-16x32x32.png", "decoded.gif", "preview.png"):
            (folder / name).write_bytes(png(CHANGED))
    for path in source.rglob("*.png"):
        path.write_bytes(png(CHANGED))
    again = make_job(source, out, holdout=held)
    with pytest.raises(KeyboardInterrupt):
        encode(again, progress=stop_after(again, 1), report=lambda line: None)
    assert not (out / "manifest.json").exists()
    assert rerun(make_job(source, out, holdout=held))[0] is not None
    found = [levels(read_all(folder)[1]["latents"]) for folder in (out, held)]
    assert found == [{77}, {77}] and (out / "statistics.png").exists()


def test_an_unfinished_job_whose_inputs_change(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = make_job(source, out, holdout=tmp_path / "held")
    with pytest.raises(KeyboardInterrupt):
        encode(job, progress=stop_after(job, 2))
    for path in sorted(source.rglob("*.png")):
        path.write_bytes(png(CHANGED))
    result, lines, encoded = rerun(make_job(source, out, holdout=tmp_path / "held"))
    assert result is not None and encoded == COUNT and f"{COUNT} changed (the first: {source}/0/" in lines[0]
    for folder in (out, tmp_path / "held"):
        _, data = read_all(folder)
        assert levels(data["latents"]) == {77}


def test_a_repeat_that_is_interrupted_goes_on(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    encode(make_job(source, out))
    for path in sorted(source.rglob("*.png"))[::2]:
        path.write_bytes(png(CHANGED))
    job = make_job(source, out)
    with pytest.raises(KeyboardInterrupt):
        encode(job, progress=stop_after(job, 1), report=lambda line: None)
    assert not (out / "manifest.json").exists()  # a set that is half old is none
    result, lines, encoded = rerun(make_job(source, out))
    assert result is not None and lines == [] and 0 < encoded < COUNT
    assert_encodes(source, out)


def test_all_ranks_take_part_in_a_repeat(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    encode(make_job(source, out))
    for path in source.rglob("*.png"):
        path.write_bytes(png(CHANGED))
    ranks = [ProcessRank(rank, 2) for rank in range(2)]
    job = make_job(source, out)
    assert [remaining(job, rank, print) for rank in ranks] == ["shared", "shared"]
    with pytest.raises(KeyboardInterrupt):  # the first one has made the plan
        encode(job, ranks[0], lambda *told: (_ for _ in ()).throw(KeyboardInterrupt), report=lambda line: None)
    assert encode(job, ranks[1]) is None
    assert encode(job, ranks[0]) is not None
    assert_encodes(source, out)
    assert [remaining(job, rank, print) for rank in ranks] == ["nothing", "nothing"]


def test_a_rank_that_lists_other_inputs_than_the_first_ends(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(source, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        encode(job, progress=stop_after(job, 1))
    next(source.rglob("*.png")).write_bytes(png(CHANGED))
    monkeypatch.setattr("rdm_scale.encoding.runner.LISTING_S", 0.0)
    with pytest.raises(DataError, match="rank 1 lists other inputs than rank 0, in size or time: do not change them"):
        encode(make_job(source, tmp_path / "out"), ProcessRank(1, 2))


def test_copied_inputs_can_be_trusted(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    encode(make_job(source, out))
    before = contents(out)
    shutil.copytree(source, tmp_path / "copy", copy_function=shutil.copyfile)  # with new times
    with pytest.raises(
        DataError, match=rf"holds the encoding of {source}, and {tmp_path}/copy has other files of the same names"
    ):
        rerun(make_job(tmp_path / "copy", out))
    assert rerun(make_job(tmp_path / "copy", out, trust_inputs=True))[2] == 0
    assert contents(out) == before and rerun(make_job(tmp_path / "copy", out))[2] == 0
    job = make_job(source, tmp_path / "other")
    with pytest.raises(KeyboardInterrupt):
        encode(job, progress=stop_after(job, 2))
    recorded = len(list((tmp_path / "other/.encoding").glob("train-*")))
    result, _, encoded = rerun(make_job(tmp_path / "copy", tmp_path / "other", trust_inputs=True))
    assert result is not None and encoded == COUNT - 12 * recorded


def test_added_and_removed_inputs_are_said(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    encode(make_job(source, out))
    for name in ("0/a.png", "1/b.png"):
        (source / name).write_bytes(png(CHANGED))
    next((source / "9").glob("*.png")).unlink()
    with pytest.raises(
        DataError, match=rf"\(inputs since then: 2 new \(the first: {source}/0/a\.png\), 1 no longer there\)$"
    ):
        rerun(make_job(source, out))


def test_the_same_names_in_a_list_of_other_files(tmp_path: Path) -> None:
    write_digits(tmp_path / "old", 10)
    write_digits(tmp_path / "new", 10)
    for path in (tmp_path / "new").rglob("*.png"):
        path.write_bytes(png(CHANGED))

    def listed(folder: str) -> EncodingJob:
        paths = sorted((tmp_path / folder).rglob("*.png"))
        rows = [{"path": str(path), "key": str(number)} for number, path in enumerate(paths)]
        (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return make_job(tmp_path / "list.jsonl", tmp_path / "out")

    encode(listed("old"))
    result, lines, _ = rerun(listed("new"))
    assert result is not None and "10 changed" in lines[0]
    assert levels(read_all(tmp_path / "out")[1]["latents"]) == {77}


def test_jobs_of_earlier_versions(source: Path, tmp_path: Path) -> None:
    """They recorded no identity of their inputs, and kept nothing of a job that was complete."""
    job = make_job(source, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        encode(job, progress=stop_after(job, 2))
    work = tmp_path / "out/.encoding"
    (work / "inputs.safetensors").unlink()
    plan = json.loads((work / "plan.json").read_text())
    (work / "plan.json").write_text(json.dumps({name: plan[name] for name in ("job", "threads", "probes", "decoding")}))
    for path in work.glob("train-*"):
        record = json.loads(path.read_text())
        record["rejected"] = [one[:2] for one in record["rejected"]]
        path.write_text(json.dumps(record))
    recorded = len(list(work.glob("train-*")))
    result, lines, encoded = rerun(make_job(source, tmp_path / "out"))
    assert result is not None and encoded == COUNT - 12 * recorded > 0
    assert "begun by an earlier version" in lines[0] and "What it has encoded is kept" in lines[0]
    shutil.rmtree(work)
    result, lines, encoded = rerun(make_job(source, tmp_path / "out"))
    assert result is None and encoded == 0 and "whether they have changed since is not known" in lines[0]


def test_a_job_that_was_begun_by_a_version_that_decodes_otherwise_is_encoded_again(
    source: Path, tmp_path: Path
) -> None:
    job = make_job(source, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        encode(job, progress=stop_after(job, 2))
    work = tmp_path / "out/.encoding"
    for path in (work / "plan.json", *work.glob("train-*")):
        content = json.loads(path.read_text())
        assert content.pop("decoding") == DECODING_VERSION
        path.write_text(json.dumps(content))
    result, lines, encoded = rerun(make_job(source, tmp_path / "out"))
    assert result is not None and encoded == COUNT
    assert "out was begun by a version that decodes images and videos to other pixels: all of it is" in lines[0]
    assert rerun(make_job(source, tmp_path / "out"))[2] == 0
