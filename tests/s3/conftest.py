"""Fixtures: one real S3 server for all tests, and a proxy in front of it that is reset for each test."""

import uuid
from collections.abc import Iterator

import pytest

from rdm_scale.tools.s3_server import S3Server
from tests.support.fault_proxy import FaultProxy


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server with the bucket `latents`, reached directly, without faults."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with the AWS environment set to its address."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(scope="session")
def shared_proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    """One proxy for all tests: making a client takes a third of a second, and clients are cached by address."""
    with FaultProxy(s3_server.port) as proxy:
        yield proxy


@pytest.fixture
def proxy(s3_server: S3Server, shared_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy without faults or counts in front of the server, with the AWS environment set to its address."""
    for name, value in s3_server.environment(shared_proxy.endpoint).items():
        monkeypatch.setenv(name, value)
    shared_proxy.clear()
    yield shared_proxy
    shared_proxy.clear()


@pytest.fixture
def prefix() -> str:
    """A folder of the bucket `latents` that no other test uses: `s3://latents/PREFIX`."""
    return uuid.uuid4().hex
