"""Tar archives in USTAR format, packed in memory."""

import io
import tarfile
from collections.abc import Iterable
from typing import NamedTuple


class PackedTar(NamedTuple):
    """Bytes of a tar, and the offset of each file's content in them."""

    content: bytes
    offsets: list[int]


def pack_ustar(files: Iterable[tuple[str, bytes]]) -> PackedTar:
    """Pack files, given as (name, content), in their order.

    Times, owners and modes are constants, so the same files give the same bytes.
    """
    buffer, offsets = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)  # mtime 0, uid 0, gid 0, mode 0644, no user name
            info.size = len(content)
            offsets.append(tar.offset + tarfile.BLOCKSIZE)
            tar.addfile(info, io.BytesIO(content))
    return PackedTar(buffer.getvalue(), offsets)
