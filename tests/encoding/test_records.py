"""Records of finished shards."""

import pytest

from rdm_scale.encoding.runner import encode
from rdm_scale.errors import DataError
from tests.support.encoding_jobs import (
    contents,
    make_job,
    stop_after,
)

COUNT = 60


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
