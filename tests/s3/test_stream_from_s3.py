"""The data stream from a real S3 server: each byte is read about once per epoch, and every fault is noticed."""

import re
from collections.abc import Iterator
from itertools import islice

import pytest
import torch

from rdm_scale.codecs.record import CodecRecord
from rdm_scale.config import DataConfig, DataSource
from rdm_scale.data import LatentStream
from rdm_scale.data.manifest import Manifest
from rdm_scale.data.shard_writer import ShardWriter
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location, Retry, retrying
from rdm_scale.tools.s3_server import S3Server
from tests.support.fault_proxy import Fault, FaultProxy, Request

OPENED: list[LatentStream] = []
QUICK = Retry(attempts=20, budget_s=300.0, stall_s=1.0, first_wait_s=0.02, longest_wait_s=0.1)


def write(url: str, samples: int, per_member: int = 4, members_per_shard: int = 20) -> Manifest:
    codec = CodecRecord(name="identity", location="identity")
    with ShardWriter(
        Location(url),
        kind="mode",
        dtype="float32",
        shape=(1, 1, 4, 4),
        codec=codec,
        class_names=(),
        samples_per_member=per_member,
        members_per_shard=members_per_shard,
    ) as writer:
        ids = torch.arange(samples)
        writer.add(torch.randn(samples, 1, 1, 4, 4), ids, torch.full_like(ids, -1))
    return writer.close()


@pytest.fixture(autouse=True)
def closing() -> Iterator[None]:
    """Stop all reading threads at the end of a test."""
    yield
    while OPENED:
        OPENED.pop().close()


def stream_of(url: str, batch: int = 8, rank: int = 0, dp: int = 1, **config: object) -> LatentStream:
    sources = [DataSource(path=url)]
    settings = DataConfig.model_validate({"train": url, "workers": 2} | config)
    OPENED.append(LatentStream(sources, global_batch_size=batch, seed=1, dp_rank=rank, dp_size=dp, config=settings))
    return OPENED[-1]


def is_shard(request: Request) -> bool:
    return request.method == "GET" and request.path.endswith(".tar")


def test_all_replicas_together_read_the_set_about_once_an_epoch(proxy: FaultProxy, prefix: str) -> None:
    """20 members a stream: the few that two streams share are read twice, and nothing else is."""
    url = f"s3://latents/{prefix}"
    manifest = write(url, samples=8 * 20 * 4)
    tars = sum(shard.bytes for shard in manifest.shards)
    streams = [stream_of(url, rank=rank, dp=2, workers=1) for rank in range(2)]
    proxy.clear()
    ids = [[batch.ids for batch in islice(stream, 80)] for stream in streams]
    assert torch.cat(ids[0] + ids[1]).sort().values.tolist() == list(range(640))
    members = sum(member.bytes for shard in manifest.shards for member in shard.members)
    read = sum(request.sent for request in proxy.requests if is_shard(request))
    ahead = 2 * 2 * tars / 80  # runs of two members, of the two workers, who are at the next epoch by then
    assert members <= read <= 1.05 * tars + ahead


def test_the_first_batch_opens_no_more_at_step_100_000(proxy: FaultProxy, prefix: str) -> None:
    url = f"s3://latents/{prefix}"
    write(url, samples=640)
    opened = []
    for step in (1, 100_001):
        stream = stream_of(url)
        proxy.clear()
        stream.batch(step)
        opened.append(len([request for request in proxy.requests if is_shard(request)]))
    assert opened[1] <= opened[0] <= 8


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", status=503, code="SlowDown"),
        Fault("status", status=500, code="InternalError"),
        Fault("reset"),
        Fault("drop", after=300),
        Fault("truncate", after=300),
        Fault("stall", after=300),
    ],
    ids=lambda fault: f"{fault.kind} {fault.status}",
)
def test_transient_faults_do_not_change_the_batches(proxy: FaultProxy, prefix: str, fault: Fault) -> None:
    url = f"s3://latents/{prefix}"
    write(url, samples=128)
    with retrying(QUICK):
        expected = [batch.ids.tolist() for batch in islice(stream_of(url), 40)]
        proxy.add(fault, is_shard, times=3)
        proxy.add(fault, lambda request: request.path.endswith("manifest.json"), times=1)
        assert [batch.ids.tolist() for batch in islice(stream_of(url), 40)] == expected


def test_permanent_faults_name_shard_member_and_reason(proxy: FaultProxy, prefix: str) -> None:
    url = f"s3://latents/{prefix}"
    write(url, samples=128)
    with retrying(QUICK):
        stream = stream_of(url)
        proxy.add(Fault("status", status=503, code="SlowDown"), is_shard)
        with pytest.raises(DataError, match=r"cannot read member \d{8}\.safetensors .*shard-00000\d\.tar") as raised:
            next(iter(stream))
        assert "SlowDown" in str(raised.value)


def test_every_kind_of_loss_is_found(s3_environment: S3Server, prefix: str) -> None:
    """Loss in an object in the middle of the order; the error has the expected value and the one found."""
    url = f"s3://latents/{prefix}"
    manifest = write(url, samples=320)
    shard, key = manifest.shards[2], f"{prefix}/shard-000002.tar"
    intact = s3_environment.get(key)

    def read_all() -> None:
        for _ in islice(stream_of(url), 40):
            pass

    flipped = shard.members[7].offset + 400
    boundary = shard.members[10].offset + shard.members[10].bytes
    for content, message in (
        (
            intact[: boundary + (-boundary) % 512],
            f"has {boundary + (-boundary) % 512} bytes, the manifest says {len(intact)}",
        ),
        (intact[:-1000], f"has {len(intact) - 1000} bytes, the manifest says {len(intact)}"),
        (
            intact[:flipped] + bytes([intact[flipped] ^ 1]) + intact[flipped + 1 :],
            r"is not what was written: its xxh3 is \w+, the manifest",
        ),
    ):
        s3_environment.put(key, content)
        with pytest.raises(DataError, match=rf"shard-000002\.tar.*{message}"):
            read_all()
    s3_environment.client().delete_object(Bucket="latents", Key=key)
    with pytest.raises(DataError, match=r"shard-000002\.tar is missing, and the manifest lists it"):
        read_all()
    s3_environment.put(key, intact)
    stream = stream_of(url)
    s3_environment.put(key, bytes(len(intact)))
    with pytest.raises(DataError, match=r"shard-000002\.tar was replaced while it was in use"):
        for _ in islice(stream, 40):
            pass


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [("AWS_SECRET_ACCESS_KEY", "wrong", "AWS_"), ("AWS_ACCESS_KEY_ID", "nobody", "AWS_")],
)
def test_wrong_credentials_are_reported_at_once(
    s3_environment: S3Server, prefix: str, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    url = f"s3://latents/{prefix}"
    write(url, samples=32)
    monkeypatch.setenv(variable, value)
    with pytest.raises(DataError, match=re.escape(message)):
        stream_of(url)


def test_wrong_bucket_and_an_empty_manifest(s3_environment: S3Server, prefix: str) -> None:
    with pytest.raises(DataError, match="there is no manifest s3://no-such-bucket"):
        stream_of(f"s3://no-such-bucket/{prefix}")
    s3_environment.put(f"{prefix}/manifest.json", b"")
    with pytest.raises(DataError, match="is not a valid manifest"):
        stream_of(f"s3://latents/{prefix}")


def test_disk_cache_serves_the_second_epoch(proxy: FaultProxy, prefix: str, tmp_path: object) -> None:
    url = f"s3://latents/{prefix}"
    write(url, samples=320)
    settings = {"cache_dir": str(tmp_path), "cache_gib": 1.0, "workers": 1}
    first = [batch.ids.tolist() for batch in islice(stream_of(url, **settings), 40)]
    proxy.clear()
    assert [batch.ids.tolist() for batch in islice(stream_of(url, **settings), 40)] == first
    assert not [request for request in proxy.requests if is_shard(request)]
