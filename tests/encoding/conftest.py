"""Inputs that the tests of a module share."""

import pytest

from tests.support.clip_files import BUNNY
from tests.support.encoding_jobs import write_clips, write_digits


@pytest.fixture(scope="module")
def digits(request, tmp_path_factory):
    """A folder of COUNT images; the module that uses it defines COUNT."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, request.module.COUNT)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder, 5)
    return folder


@pytest.fixture(scope="session")
def bunny() -> bytes:
    return BUNNY.read_bytes()
