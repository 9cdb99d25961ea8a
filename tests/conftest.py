"""`ranks`: runs a function on real ranks."""

import pytest
from rank_pool import RankPool


@pytest.fixture(scope="session")
def ranks() -> RankPool:
    return RankPool()
