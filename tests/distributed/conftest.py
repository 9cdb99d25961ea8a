"""`ranks`: a pool of worker processes that lives as long as the test session."""

from collections.abc import Iterator

import pytest
from rank_pool import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(8)
    yield pool
    pool.close()
