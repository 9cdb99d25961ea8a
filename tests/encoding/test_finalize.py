"""The end of a job: rejected inputs are listed, counted, and encoded once repaired; written shards are still there."""

import json
import shutil

import pytest

from rdm_scale import rng
from rdm_scale.data.shard_writer import sample_id
from rdm_scale.encoding.job import EncodingJob
from rdm_scale.encoding.runner import encode
from rdm_scale.errors import DataError
from tests.support.encoding_jobs import (
    assert_done,
    contents,
    make_job,
    read_all,
    stop_after,
)

COUNT = 60


def reasons(out) -> dict[str, str]:
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    found = {line["input"].rsplit("/", 1)[-1]: line["reason"] for line in lines}
    assert len(found) == len(lines)
    return found


def test_images_that_cannot_be_decoded(digits, tmp_path):
    source = tmp_path / "in"
    shutil.copytree(digits, source)
    paths = sorted(source.rglob("*.png"))
    paths[0].write_bytes(paths[0].read_bytes()[:-30])
    paths[1].rename(paths[1].with_suffix(".jpg")).write_text("dear diary")
    encode(make_job(digits, tmp_path / "whole", flips=True))
    (source / "empty.png").write_bytes(b"")
    listed = tmp_path / "list.jsonl"
    rows = [
        {"path": str(p), "key": str(p.relative_to(source).with_suffix(""))} for p in sorted(source.rglob("*/*.[pj]*g"))
    ]
    listed.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"path": "in/empty.png", "key": "empty"}]))

    job = make_job(listed, tmp_path / "out", flips=True, max_rejected=0.02)
    with pytest.raises(
        DataError, match=rf"3 of {COUNT + 1} inputs cannot be encoded, more than a share of 0.02: see .*"
    ) as error:
        encode(job)
    assert str(tmp_path / "out/rejected.jsonl") in str(error.value) and "--max-rejected" in str(error.value)
    found = reasons(tmp_path / "out")  # of each input once, not of each of its views
    assert found.keys() == {paths[0].name, paths[1].stem + ".jpg", "empty.png"}
    assert all(name in reason for name, reason in found.items())
    assert not (tmp_path / "out/manifest.json").exists()

    # the share is raised: nothing is encoded again
    job.codec.encode = None
    raised = make_job(listed, tmp_path / "out", flips=True, max_rejected=0.05)
    raised.codec.encode = None
    encoded = encode(raised)
    assert encoded.train.rejected == 3 and encoded.train.samples == 2 * (COUNT - 2)
    _, data = read_all(tmp_path / "out")
    _, whole = read_all(tmp_path / "whole")
    missing = {sample_id(str(p.relative_to(source).with_suffix("")), 0, view) for p in paths[:2] for view in (0, 1)}
    assert set(data["ids"].tolist()) == set(whole["ids"].tolist()) - missing
    assert_done(tmp_path / "out")


def test_a_repaired_input_is_encoded_by_the_same_command(digits, tmp_path, monkeypatch):
    source = tmp_path / "in"
    shutil.copytree(digits, source)
    broken = sorted(source.rglob("*.png"))[:2]
    for path in broken:
        path.write_bytes(b"")
    encode(make_job(digits, tmp_path / "whole"))
    job = make_job(source, tmp_path / "out")
    with pytest.raises(DataError, match=f"2 of {COUNT} inputs"):
        encode(job)
    for path in broken:
        shutil.copy(digits / path.relative_to(source), path)
    job = make_job(source, tmp_path / "out")  # as the next process lists it
    again = []
    real = job.codec.encode
    monkeypatch.setattr(job.codec, "encode", lambda pixels: again.append(len(pixels)) or real(pixels))
    assert encode(job).train.rejected == 0
    assert 0 < sum(again) <= 24  # the shards of these two only
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")  # and no list of rejected ones is left


def test_videos_that_cannot_be_decoded(clips, tmp_path):
    source = tmp_path / "in"
    shutil.copytree(clips, source)
    # the one whose clips come first: without them, all shards are others
    worst = min("01234", key=lambda key: min(rng.key(0, "shuffle", key, clip, 0) for clip in (0, 1))) + ".mp4"
    (source / worst).write_bytes((source / worst).read_bytes()[:700])
    (source / "another.mp4").write_bytes((clips / "1.mp4").read_bytes())

    def listed() -> EncodingJob:
        """The job as the next process lists its inputs."""
        return make_job(
            source, tmp_path / "out", 16, frames=5, max_rejected=0.1, samples_per_member=1, members_per_shard=2
        )

    with pytest.raises(DataError, match="1 of 6 inputs"):
        encode(listed())
    assert reasons(tmp_path / "out").keys() == {worst}
    # Once repaired, it adds clips that shift all others: no old shard may stand for a new one.
    first = contents(tmp_path / "out")
    shutil.copy(clips / worst, source / worst)
    with pytest.raises(KeyboardInterrupt):
        encode(
            listed(),
            progress=lambda stage, done, total: (
                (_ for _ in ()).throw(KeyboardInterrupt) if done >= 8 and stage == "encoding" else None
            ),
        )
    (source / worst).write_bytes(b"")
    (tmp_path / "out/.encoding/plan.json").unlink()
    with pytest.raises(DataError, match="1 of 6 inputs"):
        encode(listed())
    shards = {name: content for name, content in first.items() if name.endswith(".tar")}
    assert {name: content for name, content in contents(tmp_path / "out").items() if name.endswith(".tar")} == shards
    shutil.copy(clips / worst, source / worst)
    encode(listed())
    encode(make_job(source, tmp_path / "whole", 16, frames=5, samples_per_member=1, members_per_shard=2))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_split_of_which_nothing_can_be_decoded(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / f"in/{i}.png").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"none of the inputs of the train split could be encoded: see .*rejected.jsonl"
    ):
        encode(make_job(tmp_path / "in", tmp_path / "out", max_rejected=1.0))
    assert len(reasons(tmp_path / "out")) == 3


def test_a_shard_that_is_removed_or_cut_before_the_end_is_noticed(digits, tmp_path):
    encode(make_job(digits, tmp_path / "whole"))
    job = make_job(digits, tmp_path / "out")
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-512])):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with pytest.raises(KeyboardInterrupt):
            encode(job, progress=stop_after(job, 2))
        damage(tmp_path / "out/shard-000000.tar")
        with pytest.raises(DataError, match=r"shard-000000.tar was written, but is now missing or incomplete: run"):
            encode(job)
        assert not (tmp_path / "out/manifest.json").exists()
        encode(job)
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
