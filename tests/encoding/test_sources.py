"""Sources of the held-out split, keys of several tars, and inputs that are smaller than what is encoded."""

import json
from pathlib import Path

import numpy as np
import pytest

from rdm_scale.encoding.inputs import Columns, find_media
from rdm_scale.encoding.planning import EncodingSettings, PixelBucket, inputs_digest, make_plan, split_files
from rdm_scale.encoding.runner import encode
from rdm_scale.errors import DataError
from tests.support.encoding_jobs import make_job, png, read_all, write_clips
from tests.support.media_files import RED, write_tar

SETTINGS = EncodingSettings((PixelBucket(1, 8, 8),), holdout_share=0.3)


def write_list(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sources(url: str, columns: Columns | None = None) -> list[str]:
    return [file.source for file in find_media(url, columns).files]


def test_all_captions_of_a_file_lie_on_one_side(tmp_path: Path) -> None:
    rows = [{"path": f"im/{i}.png", "key": f"{i}-{c}", "caption": "x"} for i in range(20) for c in range(5)]
    found = find_media(write_list(tmp_path / "list.jsonl", rows))
    plan = make_plan(found, SETTINGS, None)
    sides: dict[str, set[str]] = {}
    for shard in plan.shards:
        for sample in shard.samples:
            sides.setdefault(found.files[sample.file].origin, set()).add(shard.split)
    assert len(sides) == 20 and all(len(side) == 1 for side in sides.values())
    assert set().union(*sides.values()) == {"train", "holdout"}
    train, held = split_files(found.files, 0, 0.3)
    assert {file.origin for file in train}.isdisjoint({file.origin for file in held}) and held


def test_the_source_of_an_entry(tmp_path: Path) -> None:
    url = "https://example.org/a.png"
    paths = ["im/1.png", "./im/1.png", f"{tmp_path}/im/1.jpg", "/other/2.png", url, f"{url}?w=256", f"{url}?w=512"]
    keyed = [{"path": path, "key": str(number)} for number, path in enumerate(paths)]
    expected = ["im/1", "im/1", "im/1", "/other/2", *["https://example.org/a"] * 3]
    assert sources(write_list(tmp_path / "list.jsonl", keyed)) == expected
    # Without keys, the path is the key, as it was in earlier versions; sizes of one address are one source.
    plain = [{"path": path} for path in (f"{tmp_path}/im/1.jpg", f"{url}?w=256", f"{url}?w=512")]
    assert sources(write_list(tmp_path / "list.jsonl", plain)) == [f"{tmp_path}/im/1", *expected[-2:]]
    grouped = [{"path": "1.png", "id": 7}, {"path": "2.png", "id": "7"}, {"path": "3.png", "id": 8}]
    assert sources(write_list(tmp_path / "list.jsonl", grouped), Columns(group="id")) == ["7", "7", "8"]
    with pytest.raises(DataError, match="line 1 has no 'film': every entry needs one"):
        sources(write_list(tmp_path / "list.jsonl", grouped), Columns(group="film"))


def test_groups_in_tars_and_folders(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {f"{i}.{kind}": data for i in range(3) for kind, data in files(i).items()})
    assert sources(str(tmp_path / "a.tar")) == ["0", "1", "2"]
    assert sources(str(tmp_path / "a.tar"), Columns(group="film")) == ["0", "0", "1"]
    with pytest.raises(DataError, match=r"0\.json has no 'scene': every entry needs one"):
        sources(str(tmp_path / "a.tar"), Columns(group="scene"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/1.png").write_bytes(RED)
    with pytest.raises(DataError, match="has no groups in a column or field 'film': only lists and tars have them"):
        sources(str(tmp_path / "in"), Columns(group="film"))


def files(number: int) -> dict[str, bytes]:
    return {"png": RED, "json": json.dumps({"film": number // 2}).encode()}


def test_jobs_of_earlier_versions_keep_their_digest_where_their_split_is_the_same(tmp_path: Path) -> None:
    keyed = find_media(write_list(tmp_path / "a.jsonl", [{"path": "1.png", "key": "k"}]))
    plain = find_media(write_list(tmp_path / "b.jsonl", [{"path": "k.png"}]))
    whole = EncodingSettings((PixelBucket(1, 8, 8),))
    assert inputs_digest(keyed, whole) == inputs_digest(plain, whole)
    assert inputs_digest(keyed, SETTINGS) != inputs_digest(plain, SETTINGS)
    assert inputs_digest(plain, whole) != inputs_digest(plain, EncodingSettings((PixelBucket(1, 8, 8),), min_size=1))


def test_keys_that_begin_anew_in_every_tar(tmp_path: Path) -> None:
    for name in ("a", "b", "deep/a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / f"{name}.tar", {f"{i:04d}.png": RED for i in range(8)})
    with pytest.raises(
        DataError, match=r"'0000'.*'0001'.*'0004', and 3 other keys occur more than once.*--prefix-keys"
    ):
        find_media(f"{tmp_path}/?.tar")

    def keys(url: str) -> list[str]:
        found = [file.key for file in find_media(url, prefix_keys=True).files]
        assert len(set(found)) == len(found)
        return found

    assert keys(f"{tmp_path}/a.tar") == [f"a/{i:04d}" for i in range(8)]  # also of a single tar: another may be added
    assert keys(f"{tmp_path}/?.tar") == [f"{name}/{i:04d}" for name in "ab" for i in range(8)]
    assert keys(f"{tmp_path}/**/*.tar")[-1] == "deep/a/0007"
    (tmp_path / "1.png").write_bytes(RED)
    with pytest.raises(DataError, match="is not a tar or a set of tars: keys cannot be prefixed"):
        find_media(write_list(tmp_path / "list.jsonl", [{"path": "1.png"}]), prefix_keys=True)


def test_small_images_are_said_or_left_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, shape in {"tiny": (6, 9), "wide": (8, 30), "flat": (7, 30), "large": (16, 16)}.items():
        (tmp_path / f"in/{name}.png").write_bytes(png(np.zeros((*shape, 3), np.uint8)))
    encoded = encode(make_job(tmp_path / "in", tmp_path / "out"))
    assert encoded is not None and encoded.train.samples == 4
    (said,) = encoded.remarks
    assert "enlarged" in said and ": 2 samples, for example " in said
    assert said.endswith(("flat.png (7 x 30 pixels)", "tiny.png (6 x 9 pixels)"))
    for number, buckets in enumerate(([(8, 8)], [(8, 8), (8, 16)])):  # with and without a look at all inputs before
        settings = {"buckets": tuple(PixelBucket(1, *size) for size in buckets), "min_size": 8}
        encoded = encode(make_job(tmp_path / "in", tmp_path / f"out{number}", **settings))
        assert encoded is not None and encoded.train.samples == 2 and encoded.train.rejected == 2
        lines = [json.loads(line) for line in (tmp_path / f"out{number}/rejected.jsonl").read_text().splitlines()]
        assert [(line["input"].rsplit("/")[-1], line["cause"]) for line in lines] == [
            ("flat.png", "size"),
            ("tiny.png", "size"),
        ]
        assert lines[1]["reason"].endswith("tiny.png has 6 x 9 pixels, less than the minimum size 8")
    assert len(read_all(tmp_path / "out0")[1]["ids"]) == 2


def test_enlarged_and_repeated_frames_are_said(tmp_path: Path) -> None:
    write_clips(tmp_path / "in", 2)  # 10 frames of 32 x 32 pixels at 24 a second

    def said(size: int, **settings: object) -> list[str]:
        out = tmp_path / f"{size}-{len(settings)}"
        encoded = encode(make_job(tmp_path / "in", out, size, frames=4, **settings))
        assert encoded is not None
        return list(encoded.remarks)

    assert said(32) == []
    (enlarged,) = said(40)
    assert enlarged.startswith("enlarged, since") and "4 samples" in enlarged and "32 x 32 pixels" in enlarged
    (repeated,) = said(32, fps=48.0)
    assert "frames repeated within a clip, since --fps is above" in repeated and ".mp4" in repeated
    with pytest.raises(DataError, match=r"has 32 x 32 pixels, less than the minimum size 33"):
        said(16, min_size=33)
