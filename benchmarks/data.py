"""Rate of reading latents, against MosaicML MDS, litdata, np.memmap, webdataset and a plain GET from S3.

Local: image latents of 8 KiB and video latents of 512 KiB in the page cache. Each loader runs in a process of its own
(benchmarks/data_loaders.py) with one thread for arithmetic. They alternate, one epoch per round, on the same samples in
shuffled order, and deliver the same: batches as one float32 tensor, latents times the dataset's scale. `ours` is
LatentStream with all that training uses: global order, one checksum per member, ids and labels. It is recreated for
each epoch, so that every member is read again into memory freed by the epoch before, as in a long run. The rows `raw`
deliver float16 as stored; np.memmap is then only a gather. `bare passes` copy from the page cache, verify, convert and
scale in file order, without anything else. Before timing, one epoch of each is checked to contain every sample once.
Rates use the CPU time of all threads, which other processes hardly change; the best round counts, and the JSON has
medians and all rounds.

S3: a SeaweedFS server on loopback with chunks of 1 MB, wall time, `ours` with checksums against one streaming GET per
object by the standard library's HTTP client; and the CPU time of server and client per MB. A batch of 256 draws from
256 contiguous reads of up to 4 MiB at a time: a dataset of 512 MiB is read completely before the first batch; in one of
2 GiB reading and batching overlap, as in a long run. First batch: its time and the shards that it opens, at step 0 and
at step 100,000.

MDS and litdata need an environment of their own, `--peers-venv`; without it the script prints how to make one. Prints
Markdown, writes benchmarks/results/data.json and docs/images/data.png.

    OMP_NUM_THREADS=1 python benchmarks/data.py --peers-venv /tmp/peers
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import LogLocator, NullFormatter
from tqdm import tqdm

from benchmarks.data_loaders import SCALE, Spec
from benchmarks.data_remote import LATER, compare, first_batch
from benchmarks.report import IMAGES, print_table, write_results
from rdm_scale.codecs.record import CodecRecord
from rdm_scale.data.manifest import Manifest
from rdm_scale.data.shard_writer import ShardWriter
from rdm_scale.storage.location import Location

HERE = Path(__file__).parent
PLOT = IMAGES / "data.png"
PEERS = {"mds": "mosaicml-streaming==0.13.0", "litdata": "litdata==0.2.76"}
IMPORTED = (
    "numpy lightning-utilities tifffile obstore boto3 botocore s3transfer jmespath python-dateutil six Brotli xxhash "
    "zstd python-snappy cramjam tqdm requests charset-normalizer idna urllib3 certifi catalogue filelock packaging "
    "pillow pyyaml matplotlib fsspec"
)
INSTALL = f"""MDS and litdata are compared where --peers-venv names an environment with them:
  python -m venv DIR
  DIR/bin/pip install -c constraints.txt torch==2.13.0
  DIR/bin/pip install --no-deps -c constraints.txt {" ".join(PEERS.values())} {IMPORTED}"""


@dataclass(frozen=True)
class Kind:
    """A kind of data set: its samples, how they are packed, and the loaders compared on it."""

    samples: int
    shape: tuple[int, int, int, int]
    samples_per_member: int
    members_per_shard: int
    batch: int
    loaders: tuple[str, ...]


IMAGE_KIND = Kind(
    65536,
    (4, 1, 32, 32),
    64,
    64,
    256,
    ("ours", "np.memmap", "bare passes", "ours raw", "np.memmap raw", "webdataset", "mds", "litdata"),
)
# The server reads an entire chunk for any range of it; its default chunk size is 4 MB.
SERVER = ("-filer.maxMB=1",)
MORE_IMAGES = replace(IMAGE_KIND, samples=2**18)
MORE_IN_LARGE_MEMBERS = replace(MORE_IMAGES, samples_per_member=512, members_per_shard=8)
VIDEOS = Kind(
    1024,
    (16, 16, 32, 32),
    8,
    8,
    8,
    (*IMAGE_KIND.loaders, "mds raw", "litdata raw"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers-venv", type=Path, help="environment with MDS and litdata")
    parser.add_argument("--dir", type=Path, help="folder for about 7 GB of data (default: the system's temporary)")
    parser.add_argument("--share", type=float, default=1.0, help="of the samples, to try it out")
    options = parser.parse_args()
    if options.peers_venv is None:
        print(INSTALL)
    result: dict[str, Any] = {"cores": os.cpu_count(), "rounds": options.rounds, "versions": versions(options)}
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        for name, kind in (("images", IMAGE_KIND), ("videos", VIDEOS)):
            result[name] = local(kind, Path(folder) / name, options)
            print_local(name, result[name])
        result["first_batch"] = [first_batch(str(Path(folder) / "images" / "ours"), batch) for batch in (8, 256)]
        result["s3"] = remote(Path(folder) / "s3", options)
    print_rest(result)
    write_results(__file__, result)
    plot(result)


def versions(options: argparse.Namespace) -> dict[str, str]:
    """Installed versions of what is compared."""
    wanted = {sys.executable: ["torch", "numpy", "webdataset"]}
    if options.peers_venv is not None:
        wanted[str(options.peers_venv / "bin" / "python")] = [spec.split("==")[0] for spec in PEERS.values()]
    found: dict[str, str] = {}
    for python, names in wanted.items():
        code = "import json, sys, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
        found |= json.loads(subprocess.run([python, "-c", code, *names], check=True, capture_output=True).stdout)
    return found


# ---- local files


def local(kind: Kind, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Rates of all loaders, by CPU time and wall time."""
    samples = max(1, round(kind.samples * options.share) // kind.batch) * kind.batch
    spec = Spec(str(folder), samples, list(kind.shape), kind.batch)
    loaders = [name for name in kind.loaders if peer(name) is None or options.peers_venv is not None]
    folder.mkdir()
    write(kind, Location(folder / "ours"), samples, folder / "raw.bin")
    for name in PEERS:
        if name in loaders:
            command = [str(options.peers_venv / "bin" / "python"), str(HERE / "data_loaders.py"), "write", name]
            subprocess.run([*command, json.dumps(spec._asdict())], check=True, capture_output=True)
    workers = {name: Worker(name, spec, options.peers_venv) for name in loaders}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in loaders}
    for worker in workers.values():
        worker.epoch("check")
    for _ in tqdm(range(options.rounds), unit="round"):
        for name, worker in workers.items():
            times[name].append(worker.epoch("time"))
    for worker in workers.values():
        worker.close()
    return {"kind": asdict(kind) | {"samples": samples}, "loaders": {n: rates(t, samples) for n, t in times.items()}}


def peer(loader: str) -> str | None:
    """Package of a loader that runs in --peers-venv; None for loaders of this environment."""
    name = loader.removesuffix(" raw")
    return name if name in PEERS else None


class Worker:
    """Process that runs one loader."""

    def __init__(self, name: str, spec: Spec, peers_venv: Path | None) -> None:
        self.name = name
        python = str(peers_venv / "bin" / "python") if peer(name) and peers_venv else sys.executable
        self._process = subprocess.Popen(
            [python, str(HERE / "data_loaders.py"), "read", name, json.dumps(spec._asdict())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def epoch(self, request: str) -> dict[str, float]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("@"):  # libraries print as well
                return dict(json.loads(line[1:]))
        raise SystemExit(f"the loader {self.name} ended with status {self._process.wait()}")

    def close(self) -> None:
        self._process.communicate()


def rates(times: list[dict[str, float]], samples: int) -> dict[str, Any]:
    """Microseconds per sample: best and median."""
    each = {what: [1e6 * time[what] / samples for time in times] for what in ("cpu_s", "wall_s")}
    return {
        "cpu_us": min(each["cpu_s"]),
        "median_cpu_us": statistics.median(each["cpu_s"]),
        "wall_us": min(each["wall_s"]),
        "all_cpu_us": each["cpu_s"],
        "all_wall_us": each["wall_s"],
    }


def write(kind: Kind, folder: Location, samples: int, raw: Path | None = None) -> Manifest:
    """Write random latents as shards of about 32 MiB and, with `raw`, consecutively into a plain file."""
    rng, file = np.random.default_rng(0), open(raw, "wb") if raw else None  # noqa: PTH123, SIM115
    with ShardWriter(
        folder,
        kind="mode",
        dtype="float16",
        shape=kind.shape,
        codec=CodecRecord(name="identity", location="identity", scale=(SCALE,)),
        class_names=tuple(map(str, range(1000))),
        samples_per_member=kind.samples_per_member,
        members_per_shard=kind.members_per_shard,
    ) as writer:
        for first in range(0, samples, kind.batch):
            latents = rng.standard_normal((kind.batch, *kind.shape), np.float32).astype(np.float16)
            ids = torch.arange(first, first + kind.batch)
            writer.add(torch.from_numpy(latents), ids, ids % 1000)
            if file:
                latents.tofile(file)
    if file:
        file.close()
    return writer.close()


# ---- S3


def remote(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    from rdm_scale.tools.s3_server import S3Server  # on the path since data_remote was imported

    result = {}
    with S3Server(folder, options=SERVER) as server:
        os.environ.update(server.environment())
        kinds = {
            "images, 0.5 GiB": IMAGE_KIND,
            "images, 2 GiB": MORE_IMAGES,
            "images, 2 GiB, large members": MORE_IN_LARGE_MEMBERS,
            "videos, 0.5 GiB": VIDEOS,
        }
        for i, (name, kind) in enumerate(kinds.items()):
            samples = max(1, round(kind.samples * options.share) // kind.batch) * kind.batch
            url = f"s3://latents/{i}"
            manifest = write(kind, Location(url), samples)
            result[name] = compare(server, url, manifest, kind.batch, options.rounds)
        result["first_batch"] = [first_batch("s3://latents/0", batch) for batch in (8, 256)]
    return result


# ---- report


def print_local(name: str, result: dict[str, Any]) -> None:
    loaders, kind = result["loaders"], result["kind"]
    size = 2 * int(np.prod(kind["shape"]))
    print(f"\n{name}: {kind['samples']} samples of {size // 1024} KiB, batches of {kind['batch']}")
    rows = []
    for loader, row in loaders.items():
        base = loaders["ours raw" if loader.endswith(" raw") else "ours"]["cpu_us"]
        figures = f"{row['cpu_us']:.2f}", f"{size / row['cpu_us']:.0f}", f"{row['cpu_us'] / base:.2f} x"
        rows.append((loader, *figures, f"{row['wall_us']:.2f}"))
    header = "CPU time a sample (us)", "MB/s of CPU time", "ours is faster by", "wall time a sample (us)"
    print_table(("loader", *header), rows)


def print_rest(result: dict[str, Any]) -> None:
    rows: list[tuple[object, ...]] = []
    for name, row in result["s3"].items():
        if name == "first_batch":
            continue
        get, ours = row["mb_s"]["streaming GET"], row["mb_s"]["ours"]
        cpu = "; ".join(f"{who} {of['server']:.2f}, {of['client']:.2f}" for who, of in row["cpu_ms_mb"].items())
        size = f"{row['member_bytes'] >> 10} KiB"
        rows.append((name, size, f"{get:.0f}", f"{ours:.0f}", f"{row['ours_over_get']:.2f}", cpu))
    header = "members of", "streaming GET (MB/s)", "ours (MB/s)", "ours / GET", "server, client: CPU ms a MB"
    print_table(("from S3", *header), rows)
    rows = []
    for place, batches in (("local", result["first_batch"]), ("S3", result["s3"]["first_batch"])):
        for row in batches:
            early, late = row["step 0"], row[f"step {LATER}"]
            figures = [cell for at in (early, late) for cell in (f"{at['seconds']:.3f}", at["shards"])]
            rows.append((place, row["batch"], *figures))
    print_table(("first batch", "samples", "step 0: s", "shards", f"step {LATER:,}: s", "shards"), rows)
    print("\nversions:", ", ".join(f"{name} {version}" for name, version in result["versions"].items()))


def plot(result: dict[str, Any]) -> None:
    """Draw local rates by CPU time and S3 rates by wall time."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), width_ratios=(1.2, 1.2, 1))
    for name, axis in zip(("images", "videos"), axes[:2], strict=True):
        size = 2 * int(np.prod(result[name]["kind"]["shape"]))
        rows = {n: size / row["cpu_us"] for n, row in result[name]["loaders"].items() if not n.endswith(" raw")}
        names = sorted(rows, key=lambda n: rows[n])
        bars = axis.barh(names, [rows[n] for n in names], color=["tab:red" if n == "ours" else "0.6" for n in names])
        axis.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
        axis.set(title=f"{name}, {size // 1024} KiB", xscale="log", xlabel="MB/s of CPU time, float32 batches")
        axis.set_xlim(min(rows.values()) / 2, max(rows.values()) * 3)
        axis.xaxis.set_minor_formatter(NullFormatter())  # within one decade every tick would have a label
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0,)))
        axis.xaxis.set_major_formatter("{x:.0f}")
    sets = [name for name in result["s3"] if name != "first_batch"]
    for i, loader in enumerate(("streaming GET", "ours")):
        values = [result["s3"][name]["mb_s"][loader] for name in sets]
        at = [place + 0.4 * i for place in range(len(sets))]
        axes[2].bar(at, values, 0.38, label=loader, color="tab:red" if loader == "ours" else "0.6")
    axes[2].set(
        title="from S3 on loopback", ylabel="MB/s of wall time", xticks=[place + 0.2 for place in range(len(sets))]
    )
    axes[2].set_xticklabels([name.replace(", ", ",\n") for name in sets], fontsize=6)
    axes[2].margins(y=0.35)  # for the legend
    axes[2].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(PLOT, dpi=120)


if __name__ == "__main__":
    main()
