"""`ranks`: runs a function on real ranks."""

import os

import pytest
from rank_pool import RankPool


def pytest_configure(config: pytest.Config) -> None:
    """All tests but those of tests/gpu are of the CPU, on a machine with GPUs too."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def ranks() -> RankPool:
    return RankPool()
