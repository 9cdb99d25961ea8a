"""Inputs that the tests of a file share."""

import pytest

from tests.support.encoding_jobs import write_clips, write_digits


@pytest.fixture(scope="module")
def digits(request, tmp_path_factory):
    """As many pictures as the file says."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, request.module.COUNT)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder, 5)
    return folder
