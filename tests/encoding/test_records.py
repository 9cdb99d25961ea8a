"""Records of finished shards."""

from pathlib import Path

import pytest
from PIL import Image

from rdm_scale.encoding.color import UNREADABLE_PROFILE
from rdm_scale.encoding.runner import encode
from rdm_scale.errors import DataError
from tests.support.encoding_jobs import (
    contents,
    make_job,
    stop_after,
    write_digits,
)

COUNT = 60


def test_remarks_are_added_up_over_shards_and_earlier_runs(tmp_path: Path) -> None:
    write_digits(tmp_path / "in", 40)
    for path in sorted((tmp_path / "in").rglob("*.png"))[::2]:
        Image.open(path).save(path, icc_profile=b"no profile")
    job = make_job(tmp_path / "in", tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        encode(job, progress=stop_after(job, 2))
    result = encode(job)
    assert result is not None
    ((text, (number, example)),) = result.remarks.found.items()
    assert (text, number) == (UNREADABLE_PROFILE, 20) and Path(example).suffix == ".png"


@pytest.mark.parametrize("damage", [lambda content: content[:50], lambda content: b"{}", lambda content: b""])
def test_a_damaged_record_is_noticed(digits, tmp_path, damage):
    encode(make_job(digits, tmp_path / "whole"))
    job = make_job(digits, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        encode(job, progress=stop_after(job, 2))
    (record,) = (tmp_path / "out/.encoding").glob("train-000000-*")
    record.write_bytes(damage(record.read_bytes()))
    with pytest.raises(DataError, match=rf"{record.name} is damaged and was removed: run the same command again"):
        encode(job)
    encode(job)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
