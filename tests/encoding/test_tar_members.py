"""Tars are read to their last byte: damaged headers and foreign bytes are errors, joined archives are read on."""

import re
from pathlib import Path

import pytest

from rdm_scale.encoding.inputs import find_media
from rdm_scale.errors import DataError
from rdm_scale.storage.ustar import pack_ustar
from tests.support.media_files import RED

BLOCK = 512
MEMBER = BLOCK + -(-len(RED) // BLOCK) * BLOCK  # header and content


def tar_of(*names: str) -> bytes:
    return pack_ustar([(name, RED) for name in names]).content


def keys(path: Path, content: bytes) -> list[str]:
    path.write_bytes(content)
    return [file.key for file in find_media(str(path)).files]


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_damaged_header_is_an_error_wherever_it_is(tmp_path: Path, number: int) -> None:
    content = bytearray(tar_of(*(f"{i}.png" for i in range(4))))
    content[number * MEMBER + 3] ^= 1  # in the name: the checksum of the header is wrong now
    where = "is not a tar file" if not number else f"header at byte {number * MEMBER}, after the member '{number - 1}"
    with pytest.raises(DataError, match=rf"a\.tar .*{where}"):
        keys(tmp_path / "a.tar", bytes(content))


def test_joined_archives_are_read_on(tmp_path: Path) -> None:
    first, second, third = tar_of("1.png", "2.png"), tar_of("3.png"), tar_of("4.png")
    assert keys(tmp_path / "a.tar", first + second + third) == ["1", "2", "3", "4"]
    # with one block as the end mark, and a megabyte of padding
    cut = first[: 2 * MEMBER + BLOCK]
    assert keys(tmp_path / "a.tar", cut + bytes(2**20 + 3 * BLOCK) + second) == ["1", "2", "3"]
    files = find_media(str(tmp_path / "a.tar")).files
    assert [file.read() for file in files] == [RED] * 3
    assert keys(tmp_path / "a.tar", cut + bytes(2**21)) == ["1", "2"]


@pytest.mark.parametrize("behind", [b"\x07" * BLOCK, b"more words", tar_of("3.png")[:100]])
def test_bytes_behind_the_end_that_are_no_archive(tmp_path: Path, behind: bytes) -> None:
    first = tar_of("1.png")
    message = f"{len(behind)} bytes behind the end-of-archive mark, from byte {len(first)} on, belong to no archive"
    with pytest.raises(DataError, match=re.escape(message)):
        keys(tmp_path / "a.tar", first + behind)


def test_a_second_archive_that_is_damaged_or_cut(tmp_path: Path) -> None:
    first, second = tar_of("1.png"), bytearray(tar_of("2.png", "3.png"))
    end = MEMBER + BLOCK
    with pytest.raises(DataError, match=r"is truncated: it has no end-of-archive mark after the member '3\.png'"):
        keys(tmp_path / "a.tar", first[:end] + second[: 2 * MEMBER])
    second[MEMBER + 3] ^= 1
    with pytest.raises(DataError, match=f"the header at byte {end + MEMBER}, after the member '2.png', is not valid"):
        keys(tmp_path / "a.tar", first[:end] + second)
