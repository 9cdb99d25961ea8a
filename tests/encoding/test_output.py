"""Output folders before a job: empty, complete, unfinished, or not the job's."""

import shutil
from pathlib import Path

import pytest

from rdm_scale.encoding.inputs import find_media
from rdm_scale.encoding.job import ProcessRank
from rdm_scale.encoding.output import OutputFolders
from rdm_scale.encoding.runner import encode
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location
from tests.support.encoding_jobs import (
    contents,
    make_job,
    stop_after,
)

COUNT = 60


def test_folders_in_use_are_not_touched(digits, tmp_path):
    first = make_job(digits, tmp_path / "out")
    encode(first)
    before = contents(tmp_path / "out")
    (tmp_path / "out/decoded.png").write_bytes(b"")  # a look at it
    assert first.output.check(first.digest)
    (tmp_path / "out/decoded.png").unlink()
    other = make_job(digits, tmp_path / "out", seed=1)
    for output in (other.output, OutputFolders(Location(tmp_path / "new"), other.output.train)):
        for digest in (other.digest, other.digest[:32]):  # before the codec is loaded, too
            with pytest.raises(
                DataError, match="already holds encoded data, of other inputs or made with other settings"
            ):
                output.check(digest)
    assert contents(tmp_path / "out") == before and not (tmp_path / "new").exists()

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/shard-of-glass.tar").write_text("ten years of work")
    with pytest.raises(DataError, match=r"not empty \(it contains shard-of-glass.tar\)"):
        OutputFolders(Location(tmp_path / "thesis")).check(first.digest)
    with pytest.raises(DataError, match="is a file"):
        OutputFolders(Location(tmp_path / "thesis/shard-of-glass.tar")).check(first.digest)
    for held in (tmp_path / "a", tmp_path / "a/held", tmp_path):
        with pytest.raises(DataError, match="must be separate folders"):
            OutputFolders(Location(tmp_path / "a"), Location(held)).check(first.digest)


def test_an_unfinished_other_job_is_not_resumed(digits, tmp_path):
    job = make_job(digits, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        encode(job, progress=stop_after(job, 1))
    before = contents(tmp_path / "out")
    other = make_job(digits, tmp_path / "out", dtype="float16")
    for call in (
        lambda: other.output.check(other.digest),
        lambda: other.output.check(other.digest[:32]),
        lambda: encode(other),
        lambda: encode(other, ProcessRank(1, 2)),
    ):
        with pytest.raises(DataError, match="an unfinished encoding of other inputs or with other settings"):
            call()
    assert contents(tmp_path / "out") == before


def test_folders_are_compared_by_where_they_lead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    monkeypatch.chdir(tmp_path)
    for train, held in (("a", f"{tmp_path}/a"), ("a", "b/../a"), ("a", "link/held"), (f"{tmp_path}/link", "a")):
        with pytest.raises(DataError, match="must be separate folders, neither inside the other"):
            OutputFolders(Location(train), Location(held)).check("digest")
    assert not OutputFolders(Location("a"), Location("ab")).check("digest")
    s3 = [Location(f"{scheme}://bucket/out") for scheme in ("s3", "s3a")]
    assert s3[0].is_inside(s3[1]) and not s3[0].is_inside(Location("s3://bucket/ou"))


def test_an_output_inside_the_input_is_no_part_of_it(digits: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    shutil.copytree(digits, source)
    outputs = [Location(source / "latents"), Location(source / "0/held")]
    for folder in ("latents", "0/held"):
        (source / folder).mkdir()
        for name in ("decoded.png", "shard-000000.tar"):
            (source / folder / name).write_bytes(b"")
    found = find_media(str(source), outputs=outputs)
    assert len(found.files) == COUNT and not found.left_out
    assert len(find_media(str(source)).files) == COUNT + 2
