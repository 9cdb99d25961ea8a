"""The disk cache: lookups, eviction, sharing between processes and threads, and failures of the disk."""

import contextlib
import errno
import logging
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from rdm_scale.errors import ConfigError
from rdm_scale.storage.cache import MemberCache
from tests.support.limits import HANG_S


def content_of(number: int, size: int = 1000) -> bytes:
    return bytes([number % 256]) * size


def used(folder: Path) -> int:
    """Bytes in the cache, without the file that holds the total."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != ".total")


def test_content_is_found_by_another_instance(tmp_path: Path) -> None:
    cache = MemberCache(tmp_path / "new" / "cache", 10_000)
    assert cache.get("a-1") is None
    cache.put("a-1", b"content")
    cache.put("a-1", b"content")
    assert cache.get("a-1") == MemberCache(tmp_path / "new" / "cache", 10_000).get("a-1") == b"content"
    (tmp_path / "new" / "cache" / "a-1").write_bytes(b"damaged")
    cache.put("a-1", b"content")
    assert cache.get("a-1") == b"content"


def test_least_recently_used_are_evicted_first(tmp_path: Path) -> None:
    cache = MemberCache(tmp_path, 4000)
    for number in range(4):
        cache.put(f"k{number}", content_of(number))
    old = time.time() - 1000
    for age, number in enumerate((2, 0, 3, 1)):  # oldest first
        os.utime(tmp_path / f"k{number}", (old + age, old + age))
    assert cache.get("k2") == content_of(2)  # now the most recently used
    cache.put("k4", content_of(4))
    assert [number for number in range(5) if cache.get(f"k{number}")] == [
        1,
        2,
        4,
    ]  # 0 and 3 are evicted: at most 3600 bytes stay


def test_larger_than_the_limit_is_not_cached_and_evicts_nothing(tmp_path: Path) -> None:
    cache = MemberCache(tmp_path, 4000)
    cache.put("small", content_of(1))
    cache.put("large", content_of(2, 4001))
    assert cache.get("large") is None and cache.get("small") == content_of(1)


def test_a_smaller_limit_holds_at_the_next_start(tmp_path: Path) -> None:
    cache = MemberCache(tmp_path, 100_000)
    for number in range(50):
        cache.put(f"k{number}", content_of(number))
    assert used(tmp_path) == 50_000
    MemberCache(tmp_path, 10_000)
    assert 0 < used(tmp_path) <= 10_000


def test_unfinished_files_of_dead_processes_are_evicted(tmp_path: Path) -> None:
    dead, living = tmp_path / "a.partial-1-1", tmp_path / "b.partial-2-2"
    for path in (dead, living):
        path.write_bytes(bytes(3000))
    os.utime(dead, (1, 1))
    MemberCache(tmp_path, 2000)
    assert not dead.exists() and living.exists()


def run_worker(folder: Path, worker: int) -> None:
    cache = MemberCache(folder, 50_000)
    for turn in range(300):
        number = (worker * 37 + turn * 11) % 120
        found = cache.get(f"k{number}")
        assert found in (None, content_of(number)), f"k{number} is torn"
        if found is None:
            cache.put(f"k{number}", content_of(number))
        if turn % 10 == 0:
            assert size_of(folder) <= 50_000 + 3 * 1000


def size_of(folder: Path) -> int:
    total = 0
    for path in folder.glob("k*"):
        with contextlib.suppress(FileNotFoundError):  # other workers are running
            total += path.stat().st_size
    return total


def test_processes_share_a_folder_within_the_limit(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=run_worker, args=(tmp_path, worker)) for worker in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(HANG_S)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert 40_000 <= used(tmp_path) <= 53_000  # and it evicts no more than it has to


def test_threads_share_a_cache(tmp_path: Path) -> None:
    cache, torn = MemberCache(tmp_path, 20_000), []

    def hammer(worker: int) -> None:
        for turn in range(200):
            number = (worker * 7 + turn) % 40
            cache.put(f"k{number}", content_of(number))
            if cache.get(f"k{number}") not in (None, content_of(number)):
                torn.append(number)

    threads = [threading.Thread(target=hammer, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not torn and used(tmp_path) <= 20_000 + 4 * 1000


def test_unusable_folder_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"file/cache cannot be used: .*data\.cache_dir"):
        MemberCache(tmp_path / "file" / "cache", 1000)


def test_full_disk_is_an_error_at_the_start_and_a_warning_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = MemberCache(tmp_path, 10_000)
    cache.put("before", b"kept")

    def full(path: Path, content: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with caplog.at_level(logging.WARNING):
        cache.put("a", b"1")
        cache.put("b", b"2")
    assert [record.getMessage() for record in caplog.records] == [
        f"the cache {tmp_path} cannot be written to: No space left on device"
    ]
    assert cache.get("a") is None and cache.get("before") == b"kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".total", "before"]
    with pytest.raises(ConfigError, match="No space left on device"):
        MemberCache(tmp_path, 10_000)


@pytest.mark.parametrize("key", ["", "../a", "a/b", ".total", "a.partial-1-1"])
def test_key_cannot_leave_the_folder(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name"):
        MemberCache(tmp_path, 1000).put(key, b"")
