"""The device of a process, on machines with a mocked number of GPUs."""

import itertools
import time

import pytest
import torch

from rdm_scale.device import TimeMark, local_device, matmul_tflops, to_device, to_host
from rdm_scale.errors import ConfigError


def set_gpus(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)


@pytest.mark.parametrize(
    ("gpus", "local_rank", "expected"), [(0, None, "cpu"), (0, "3", "cpu"), (2, None, "cuda:0"), (2, "1", "cuda:1")]
)
def test_each_local_rank_has_a_gpu_or_the_cpu(
    monkeypatch: pytest.MonkeyPatch, gpus: int, local_rank: str | None, expected: str
) -> None:
    set_gpus(monkeypatch, gpus)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert local_device() == torch.device(expected)


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_gpus(monkeypatch, 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"2 GPUs.* start one rank per GPU, or set CUDA_VISIBLE_DEVICES="):
        local_device()


def test_the_rate_of_a_matrix_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that goes a second on at every look: 2 x 64^3 operations in a second."""
    monkeypatch.setattr(time, "perf_counter", itertools.count(10.0).__next__)
    assert matmul_tflops(torch.device("cpu"), torch.float32, size=64, repeats=2) == 2 * 64**3 / 1e12


def test_marks_and_copies_on_a_cpu() -> None:
    began, cpu = TimeMark(torch.device("cpu")), torch.device("cpu")
    time.sleep(0.01)
    ended = TimeMark(cpu)
    ended.wait()
    assert ended.seconds_since(began) >= 0.01
    values = torch.tensor([1.5, -2.0])
    copy = to_host(to_device(values, cpu))
    values.zero_()  # what comes after the copy does not change it
    assert copy.tolist() == [1.5, -2.0]
