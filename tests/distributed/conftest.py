"""Fixture `start`, which starts commands and kills them after the test."""

from collections.abc import Iterator

import pytest

from tests.support.launching import Starter


@pytest.fixture
def start() -> Iterator[Starter]:
    starter = Starter()
    yield starter
    starter.end()
