"""Locations on a real S3 server behind a faulty proxy: retries, time limits, refusals and their messages."""

import io
import random
import tarfile
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from rdm_scale.errors import ConfigError
from rdm_scale.storage.location import Location, ReplacedError, Retry, Stat, retrying
from rdm_scale.tools.s3_server import S3Server
from tests.support.fault_proxy import Fault, FaultProxy

CONTENT = random.Random(0).randbytes(300_000)
# On a busy machine a sound connection may be silent for a second or two, which must not count as a failed attempt.
QUICK = Retry(attempts=4, budget_s=300, stall_s=60, first_wait_s=0.02, longest_wait_s=0.1)
# Clients adopt `stall_s` when they are made: make the `Location` under this policy.
STALLED = Retry(attempts=20, budget_s=300, stall_s=1, first_wait_s=0.02, longest_wait_s=0.1)


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with retrying(QUICK):
        yield


@pytest.fixture
def file(s3_server: S3Server, proxy: FaultProxy, prefix: str) -> Location:
    """s3://latents/PREFIX/a b.tar, seen through the proxy."""
    s3_server.put(f"{prefix}/a b.tar", CONTENT)
    return Location(f"s3://latents/{prefix}/a b.tar")


def through_s3fs(file: Location) -> Location:
    """The same file with an option that a presigned URL cannot carry, so that s3fs reads it."""
    return Location(str(file), {"requester_pays": True})


READS: dict[str, Callable[[Location], object]] = {
    "read": lambda file: file.read() == CONTENT,
    "read_range": lambda file: file.read_range(1000, 200_000) == CONTENT[1000:201_000],
    "through s3fs": lambda file: through_s3fs(file).read_range(1000, 200_000) == CONTENT[1000:201_000],
    "stat": lambda file: file.stat().bytes == 300_000,
    "names": lambda file: file.parent.names() == ["a b.tar"],
    "find": lambda file: list(file.parent.find()) == ["a b.tar"],
    "exists": lambda file: file.exists(),
    "write": lambda file: file.write(CONTENT[:1000]) or True,  # type: ignore[func-returns-value]
    "remove": lambda file: file.remove() or True,  # type: ignore[func-returns-value]
}
ERRORS = {
    "500": Fault("status", status=500),
    "503": Fault("status", status=503),
    "429": Fault("status", status=429),
}


@pytest.mark.parametrize("call", READS)
@pytest.mark.parametrize("status", ["500", "503", "429"])
def test_transient_errors_are_retried(call: str, status: str, file: Location, proxy: FaultProxy) -> None:
    proxy.add(ERRORS[status], times=2)
    assert READS[call](file)
    statuses = [request.status for request in proxy.requests]
    assert statuses[:2] == [int(status)] * 2 and all(200 <= status < 300 for status in statuses[2:])
    assert len(statuses) == (5 if call == "remove" else 3)  # s3fs looks and lists before it removes


@pytest.mark.parametrize("call", ["read", "read_range", "through s3fs"])
@pytest.mark.parametrize(
    "fault",
    [
        Fault("reset"),
        Fault("drop", after=0),
        Fault("drop", after=100_000),
        Fault("truncate", after=100_000),
        Fault("stall", after=None),
        Fault("stall", after=100_000),
    ],
    ids=lambda fault: f"{fault.kind} {fault.after}",
)
def test_broken_responses_are_retried(call: str, fault: Fault, file: Location, proxy: FaultProxy) -> None:
    proxy.add(fault, lambda request: request.method == "GET", times=1)
    began = time.monotonic()
    if fault.kind == "stall":
        with retrying(STALLED):
            assert READS[call](Location(str(file)))
        assert proxy.count("GET") >= 2 and time.monotonic() - began >= STALLED.stall_s
    else:
        assert READS[call](file)
        assert proxy.count("GET") == 2


@pytest.mark.parametrize("call", ["stat", "names", "write"])
def test_broken_and_stalled_connections_are_retried(call: str, file: Location, proxy: FaultProxy) -> None:
    for fault in (Fault("reset"), Fault("stall", after=None)):
        proxy.add(fault, times=1)
        with retrying(STALLED):
            assert READS[call](Location(str(file)))


@pytest.mark.parametrize("call", READS)
@pytest.mark.parametrize(
    ("status", "kind"), [(403, PermissionError), (404, FileNotFoundError), (412, OSError), (501, OSError)]
)
def test_permanent_errors_are_not_retried(
    call: str, status: int, kind: type[OSError], file: Location, proxy: FaultProxy
) -> None:
    if call == "exists" and status == 404:
        kind = None  # type: ignore[assignment]
    proxy.add(Fault("status", status=status))
    if kind is None:
        assert READS[call](file) is False
    else:
        with pytest.raises(kind, match=file.parent.name):
            READS[call](file)
    # s3fs asks for a folder of that name where a file is missing
    assert len(proxy.requests) == (2 if status == 404 and call in ("stat", "exists") else 1)


def test_final_error_names_attempts_time_and_reason(file: Location, proxy: FaultProxy) -> None:
    proxy.add(Fault("status", status=503))
    message = (
        rf"{file.parent.name}/a b\.tar could not be read at {proxy.endpoint}: "
        r"gave up after 4 attempts in \d+\.\d s, the last error: 503 SlowDown\. .*data\.read_timeout_s"
    )
    with pytest.raises(OSError, match=message):
        file.read_range(0, 10)
    assert proxy.count() == 4
    for call in (file.stat, file.parent.names, lambda: file.write(b"")):
        proxy.requests.clear()
        with pytest.raises(OSError, match="4 attempts"):
            call()
        assert proxy.count() == 4  # no client retries by itself
    with proxy.refusing():
        for call in (file.read, file.stat, file.parent.names, lambda: file.write(b"")):
            with pytest.raises(OSError, match=r"4 attempts in .* the last error: .*(refused|connect)"):
                call()


def test_store_that_recovers_is_read(file: Location, proxy: FaultProxy) -> None:
    found: list[bytes] = []
    with retrying(Retry(attempts=10_000, budget_s=300, first_wait_s=0.05, longest_wait_s=0.05)):
        thread = threading.Thread(target=lambda: found.append(file.read()))
        with proxy.refusing():
            thread.start()
            time.sleep(0.5)
        thread.join()
    assert found == [CONTENT] and proxy.count("GET") == 1


@pytest.mark.parametrize("call", ["read", "read_range", "through s3fs", "names"])
def test_trickling_bytes_do_not_extend_the_budget(call: str, file: Location, proxy: FaultProxy) -> None:
    READS[call](file)  # requests that a client sends once
    proxy.add(Fault("rate", bytes_per_s=100))
    with retrying(Retry(attempts=4, budget_s=2, stall_s=60)):
        began = time.monotonic()
        with pytest.raises(OSError, match=r"1 attempt in \d+\.\d s"):
            READS[call](file)
        assert 2 <= time.monotonic() - began < 60  # a read of the whole file would take 3000


@pytest.mark.parametrize("secret", [True, False])
@pytest.mark.parametrize("call", ["read", "names", "stat", "write"])
def test_wrong_credentials_are_refused_at_once(
    call: str, secret: bool, file: Location, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY" if secret else "AWS_ACCESS_KEY_ID", "wrong")
    why = "AWS_SECRET_ACCESS_KEY does not belong" if secret else "it does not know this AWS_ACCESS_KEY_ID"
    if call == "stat":
        why = "the credentials are wrong"  # the answer to a HEAD does not say why
    with pytest.raises(
        PermissionError, match=rf"bucket 'latents' at {proxy.endpoint} denies access \(403 .*: {why}.*AWS_\*"
    ):
        READS[call](Location(str(file)))
    assert proxy.count() == 1


@pytest.mark.parametrize("call", ["read", "read_range", "stat", "names", "write"])
def test_missing_bucket_is_named_and_not_created(call: str, proxy: FaultProxy, s3_server: S3Server) -> None:
    place = Location("s3://nosuchbucket/set/file")
    place.parent.make_dir()
    with pytest.raises(FileNotFoundError, match=rf"no bucket 'nosuchbucket' .* at {proxy.endpoint}: check its name"):
        READS[call](place)
    assert len(proxy.requests) == (2 if call == "stat" else 1)
    assert "nosuchbucket" not in [bucket["Name"] for bucket in s3_server.client().list_buckets()["Buckets"]]


def test_missing_credentials_are_named(file: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(PermissionError, match=r"no credentials for it .*set AWS_ACCESS_KEY_ID and AWS_SECRET"):
        Location(str(file)).read()


@pytest.mark.parametrize("options", [{"endpont_url": "http://x"}, {"config_kwargs": {"nosuch": 1}}])
def test_unknown_options_are_a_configuration_error(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"options {next(iter(options))}"):
        Location("s3://latents/x", options)


def test_options_override_the_environment(
    file: Location, s3_server: S3Server, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong")
    given = {"endpoint_url": proxy.endpoint, "key": s3_server.access_key, "secret": s3_server.secret_key}
    assert Location(str(file), given).read_range(0, 9) == CONTENT[:9]


def test_region_of_the_environment_is_signed(
    file: Location, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.setenv("AWS_REGION", "eu-somewhere-9")
    place = Location(str(file))
    assert place.size() == 300_000 and place.read() == CONTENT
    head, get = proxy.requests
    assert "/eu-somewhere-9/s3/" in head.headers["authorization"] and "eu-somewhere-9" in get.query


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, 3, CONTENT[:3]),
        (299_998, 2, CONTENT[-2:]),
        (299_998, 3, CONTENT[-2:]),
        (300_000, 1, b""),
        (400_000, 9, b""),
        (7, 0, b""),
    ],
)
def test_range_is_cut_at_the_end_of_the_object(offset: int, length: int, expected: bytes, file: Location) -> None:
    assert file.read_range(offset, length) == expected
    assert through_s3fs(file).read_range(offset, length) == expected


def test_range_is_one_request_of_that_many_bytes(file: Location, proxy: FaultProxy) -> None:
    file.read_range(0, 10)
    file.read_range(1000, 5000)
    assert [(r.method, r.range, r.sent) for r in proxy.requests] == [
        ("GET", "bytes=0-9", 10),
        ("GET", "bytes=1000-5999", 5000),
    ]


def test_replaced_object_is_not_read(file: Location, s3_server: S3Server, proxy: FaultProxy) -> None:
    version = file.stat().version
    assert file.read_range(0, 10, version) == CONTENT[:10]
    s3_server.put(file.path.removeprefix("latents/"), CONTENT[::-1])
    proxy.clear()
    with pytest.raises(ReplacedError, match=f"a b.tar is no longer version {version}"):
        file.read_range(0, 10, version)
    assert proxy.count() == 1 and file.read_range(0, 10) == CONTENT[::-1][:10]
    assert file.stat().version != version


def test_versions_of_a_folder_come_from_one_listing(s3_server: S3Server, proxy: FaultProxy, prefix: str) -> None:
    tags = {f"{n}.tar": s3_server.put(f"{prefix}/{n}.tar", CONTENT[:n]).strip('"') for n in range(1, 6)}
    s3_server.put(f"{prefix}/below/x", b"1")
    s3_server.put(f"{prefix}-other/y", b"2")
    folder = Location(f"s3://latents/{prefix}")
    expected = {name: Stat(int(name[0]), tag) for name, tag in tags.items()}
    assert folder.stats() == expected and proxy.count() == 1
    assert all((folder / name).stat() == stat for name, stat in expected.items())
    assert folder.names() == [*sorted(tags), "below"] and list(folder.find()) == [*sorted(tags), "below/x"]
    assert folder.is_dir() and not (folder / "1.tar").is_dir() and not (folder / "nosuch").is_dir()
    assert (folder / "nosuch").stats() == (folder / "nosuch").find() == {} and (folder / "1.tar").names() == []
    with pytest.raises(IsADirectoryError):
        folder.stat()


def test_page_of_a_listing_is_retried_by_itself(s3_server: S3Server, proxy: FaultProxy, prefix: str) -> None:
    for number in range(5):
        s3_server.put(f"{prefix}/{number}", b"x")
    proxy.add(Fault("status", status=503), lambda request: "continuation-token" in request.query, times=2)
    folder = Location(f"s3://latents/{prefix}", {"s3_additional_kwargs": {"MaxKeys": 2}})
    assert folder.names() == ["0", "1", "2", "3", "4"]
    assert [request.status for request in proxy.requests] == [200, 503, 503, 200, 200]


def test_reads_of_several_threads_overlap(file: Location, proxy: FaultProxy) -> None:
    file.read_range(0, 1)
    proxy.add(Fault("gather", after=8))
    found: dict[int, bytes] = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: file.read_range(1000 * n, 500)})) for n in range(8)]
    with retrying(Retry(attempts=1, stall_s=60)):  # after which reads that wait for one another fail
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {n: CONTENT[1000 * n : 1000 * n + 500] for n in range(8)}


def test_connection_closed_by_the_server_is_not_reused(file: Location, proxy: FaultProxy) -> None:
    file.read_range(0, 1)
    with proxy.refusing():
        pass
    with retrying(Retry(attempts=1)):
        assert file.read_range(5, 5) == CONTENT[5:10]


def test_connections_and_signatures_are_reused(file: Location, proxy: FaultProxy) -> None:
    file.read_range(0, 1)
    time.sleep(1.1)  # a new signature would have another time
    file.read_range(1, 1)
    assert len({request.query for request in proxy.requests}) == 1 and proxy.connections <= 1


def test_bucket_of_another_region_is_left_to_botocore(file: Location, proxy: FaultProxy) -> None:
    proxy.add(Fault("status", status=400, code="AuthorizationHeaderMalformed"), times=1)
    file = Location(str(file), {"default_block_size": 1})  # a client of its own: it remembers
    assert file.read_range(3, 4) == CONTENT[3:7] == file.read_range(3, 4)
    assert ["authorization" in request.headers for request in proxy.requests] == [False, True, True]


def test_store_without_ranges_is_not_used(file: Location, proxy: FaultProxy) -> None:
    proxy.add(Fault("status", status=200))
    with pytest.raises(OSError, match=r"a b\.tar could not be read: the store ignores range requests"):
        file.read_range(3, 4)
    assert proxy.count() == 1


def test_open_file_seeks_and_reads_through_faults(s3_server: S3Server, proxy: FaultProxy, prefix: str) -> None:
    place = Location(f"s3://latents/{prefix}/set.tar")
    with place.open("wb") as file, tarfile.open(fileobj=file, mode="w|") as tar:
        for name in ("one", "two"):
            info = tarfile.TarInfo(name)
            info.size = len(CONTENT)

            tar.addfile(info, io.BytesIO(CONTENT))
    proxy.clear()
    proxy.add(Fault("drop", after=1000), lambda request: request.method == "GET", times=1)
    with place.open() as file, tarfile.open(fileobj=file) as tar:
        member = tar.extractfile("two")
        assert member is not None and member.read() == CONTENT
        file.seek(-10, 2)
        assert file.read() == bytes(10) and file.read() == b"" and file.tell() == place.size()
        s3_server.put(f"{prefix}/set.tar", CONTENT)
        file.seek(0)
        with pytest.raises(ReplacedError):
            file.read()


def test_writes_are_complete(s3_server: S3Server, proxy: FaultProxy, prefix: str) -> None:
    place = Location(f"s3://latents/{prefix}/out")
    proxy.add(Fault("stall", after=None), lambda request: request.method == "PUT", times=1)
    with retrying(STALLED):
        Location(str(place)).write(CONTENT)
    assert s3_server.get(f"{prefix}/out") == CONTENT and proxy.count("PUT") >= 2
    place.remove()
    assert not place.exists() and place.parent.names() == []
