"""Fixtures of the tests on several nodes; without the tools or the rights for nodes these tests are skipped."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.launching import Starter
from tests.support.network_nodes import NetworkNodes, missing_tools


@pytest.fixture
def start() -> Iterator[Starter]:
    starter = Starter()
    yield starter
    starter.end()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Callable[[int], NetworkNodes]]:
    """nodes(count) makes a network of hosts, which is removed after the test."""
    reason = missing_tools()
    if reason:
        pytest.skip(f"several nodes: {reason}")
    made: list[NetworkNodes] = []

    def make(count: int) -> NetworkNodes:
        made.append(NetworkNodes(tmp_path, count))
        return made[-1]

    yield make
    for network in made:
        network.remove()
