"""What needs an NVIDIA GPU; one is enough. Run by make test-gpu."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def gpu() -> Iterator[torch.device]:
    if not torch.cuda.is_available():
        pytest.fail("tests/gpu needs an NVIDIA GPU and a build of torch for it")
    yield torch.device("cuda", 0)
    torch.cuda.empty_cache()
