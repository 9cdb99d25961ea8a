"""The plan that ranks share, and that later runs resume from."""

import pytest
import torch

from rdm_scale.encoding.runner import encode
from rdm_scale.errors import DataError
from tests.support.encoding_jobs import (
    make_job,
    stop_after,
)

COUNT = 60


def test_the_number_of_threads_is_that_of_the_beginning(digits, tmp_path, monkeypatch):
    job = make_job(digits, tmp_path / "out")
    before = torch.get_num_threads()
    seen = []
    real = job.codec.encode
    monkeypatch.setattr(job.codec, "encode", lambda pixels: seen.append(torch.get_num_threads()) or real(pixels))
    try:
        torch.set_num_threads(3)
        with pytest.raises(KeyboardInterrupt):
            encode(job, progress=stop_after(job, 1))
        torch.set_num_threads(1)
        encode(job)
        assert set(seen) == {3} and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_damaged_plan_is_noticed(digits, tmp_path):
    job = make_job(digits, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        encode(job, progress=stop_after(job, 1))
    for content in (b"", b"[]", b'{"job": "x"}', b'{"job": "x", "threads": 1, "probes": [[1]]}'):
        (tmp_path / "out/.encoding/plan.json").write_bytes(content)
        with pytest.raises(DataError, match=r"plan.json is damaged .*: remove"):
            encode(job)
