"""Rates of reading from an S3 server and the time to the first batch, for benchmarks/data.py."""

import http.client
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

from rdm_scale.data import LatentStream
from rdm_scale.data.manifest import Manifest
from rdm_scale.storage.location import Location

LATER = 100_000  # second step at which the first batch is timed, beside step 0


def read_whole(urls: list[str]) -> int:
    """Read objects into memory, one GET each over one connection; return their bytes."""
    address = urlsplit(urls[0])
    connection = http.client.HTTPConnection(address.netloc)
    size = 0
    for url in urls:
        parts = urlsplit(url)
        connection.request("GET", f"{parts.path}?{parts.query}")
        response = connection.getresponse()
        assert response.status == 200, response.status
        size += len(response.read())
    connection.close()
    return size


def read_stream(url: str, manifest: Manifest, batch: int, start_step: int) -> int:
    """Read an epoch in verified batches; return the bytes of its members."""
    stream = LatentStream(url, global_batch_size=batch, seed=1, start_step=start_step)
    for _ in islice(stream, manifest.samples // batch):
        pass
    stream.close()
    return sum(member.bytes for shard in manifest.shards for member in shard.members)


def compare(server: Any, url: str, manifest: Manifest, batch: int, rounds: int) -> dict[str, Any]:
    """Alternate both ways of reading; return MB/s of wall time and the CPU time of server and client.

    The first round is a warm-up.
    """
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    client = server.client()
    urls = [
        client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": f"{prefix}/{shard.name}"})
        for shard in manifest.shards
    ]
    rates: dict[str, list[float]] = {"streaming GET": [], "ours": []}
    cpu: dict[str, dict[str, list[float]]] = {name: {"server": [], "client": []} for name in rates}
    for number in range(rounds + 1):
        start = number * (manifest.samples // batch)
        for name in rates:
            server_s, client_s, began = server.cpu_s(), time.process_time(), time.perf_counter()
            size = read_whole(urls) if name == "streaming GET" else read_stream(url, manifest, batch, start)
            if number:
                rates[name].append(size / 1e6 / (time.perf_counter() - began))
                cpu[name]["server"].append(1e9 * (server.cpu_s() - server_s) / size)
                cpu[name]["client"].append(1e9 * (time.process_time() - client_s) / size)
    medians = {name: statistics.median(of) for name, of in rates.items()}
    return {
        "objects": len(urls),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "member_bytes": manifest.shards[0].members[0].bytes,
        "mb_s": medians,
        "all_mb_s": rates,
        "ours_over_get": medians["ours"] / medians["streaming GET"],
        "cpu_ms_mb": {name: {who: statistics.median(v) for who, v in of.items()} for name, of in cpu.items()},
    }


@contextmanager
def opened_shards() -> Iterator[set[str]]:
    """Collect the paths of all files that are read by ranges within the block."""
    paths: set[str] = set()
    read_into = Location.read_into

    def counting(self: Location, *arguments: Any) -> int:
        paths.add(self.path)
        return read_into(self, *arguments)

    Location.read_into = counting  # type: ignore[method-assign]
    try:
        yield paths
    finally:
        Location.read_into = read_into  # type: ignore[method-assign]


def first_batch(url: str, batch: int, repeats: int = 5) -> dict[str, Any]:
    """Median seconds to the first batch, with opening the manifest, and shards opened, at step 0 and step LATER."""
    found: dict[str, Any] = {}
    seconds: dict[int, list[float]] = {0: [], LATER: []}
    for _ in range(repeats):
        for start, taken in seconds.items():
            with opened_shards() as paths:
                began = time.perf_counter()
                stream = LatentStream(url, global_batch_size=batch, seed=1, start_step=start)
                stream.batch(start + 1)
                taken.append(time.perf_counter() - began)
                stream.close()
            found[f"step {start}"] = {"shards": len(paths), "seconds": statistics.median(taken)}
    return {"batch": batch, **found}
