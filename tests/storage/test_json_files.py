"""JSON files: the bound on their size, and errors of the caller's class that name the file."""

from pathlib import Path

import pytest

from rdm_scale.errors import CheckpointError, DataError, RdmError
from rdm_scale.storage.json_files import read_bounded, read_json, read_json_object
from rdm_scale.storage.location import Location


@pytest.fixture
def file(tmp_path: Path) -> Location:
    return Location(tmp_path) / "x.json"


def test_content_within_the_bound(file: Location) -> None:
    file.write(b'{"a": [1]}')
    assert read_json_object(file, DataError, max_bytes=10) == read_json(file, DataError) == {"a": [1]}
    assert read_bounded(file, DataError, max_bytes=10) == b'{"a": [1]}'
    file.write(b"[1]")
    assert read_json(file, DataError) == [1]


@pytest.mark.parametrize("error", [DataError, CheckpointError])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": [12]}', r"x\.json is too large: at most 10 bytes are read"),
        (b"", r"x\.json is not JSON"),
        (b"{", r"x\.json is not JSON"),
        (b"\xff\xfe\xff", r"x\.json is not JSON"),
        (b"[1]", r"x\.json is not a JSON object"),
        (None, r"there is no .*x\.json"),
    ],
)
def test_refusals_name_the_file(file: Location, error: type[RdmError], content: bytes | None, message: str) -> None:
    if content is not None:
        file.write(content)
    with pytest.raises(error, match=message):
        read_json_object(file, error, max_bytes=10)


def test_deep_nesting_is_no_crash(file: Location) -> None:
    file.write(b"[" * 10**6)
    with pytest.raises(DataError, match="is not JSON"):
        read_json(file, DataError)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").mkdir()
    with pytest.raises(DataError, match=r"cannot read .*x\.json: "):
        read_json(Location(tmp_path) / "x.json", DataError)
    with pytest.raises(FileNotFoundError):
        read_bounded(Location(tmp_path) / "nothing", DataError)
