"""Worker process of benchmarks/data.py: run timed epochs of one data loader on request.

    python benchmarks/data_loaders.py write NAME SPEC     write a peer's files from the raw latents
    python benchmarks/data_loaders.py read NAME SPEC      answer each line on stdin with an epoch: {"cpu_s", "wall_s"}

benchmarks/data.py starts it, under the Python of either environment; a loader's packages are imported only when it is
requested. All loaders deliver batches of the same samples in shuffled order, one tensor each: float32, as a training
step takes them (latents times the dataset's scale), or, for names ending in `raw`, float16 as stored.
"""

import argparse
import json
import math
import os
import sys
import time
import types
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

SCALE = 0.18215
BARE_BYTES = 2**22  # read at a time by the bare passes
CACHE_BYTES = 2**19  # converted at a time by them
SHUFFLED_AT_A_TIME = 4096  # samples in the buffer of webdataset


class Spec(NamedTuple):
    """Dataset: FOLDER/raw.bin holds the latents; FOLDER/ours, mds and litdata hold the same in each loader's format."""

    folder: str
    samples: int
    shape: list[int]  # [C, T, H, W], float16
    batch: int

    def raw(self) -> Any:
        return np.memmap(Path(self.folder) / "raw.bin", np.float16, "r", shape=(self.samples, *self.shape))


def memmap(spec: Spec) -> Iterator[Iterator[Tensor]]:
    """A gather by a random permutation."""
    latents = spec.raw()
    for epoch in range(sys.maxsize):
        order = np.random.default_rng(epoch).permutation(spec.samples)
        yield (torch.from_numpy(latents[order[i : i + spec.batch]]) for i in range(0, spec.samples, spec.batch))


def bare(spec: Spec) -> Iterator[Iterator[Tensor]]:
    """Copy, verify, convert and scale, in file order and reusing memory: the least that any loader must do."""
    import xxhash

    size = 2 * math.prod(spec.shape)
    at_once, block = BARE_BYTES // size, max(1, CACHE_BYTES // size)
    buffers = [np.zeros(BARE_BYTES, np.uint8) for _ in range(16)]
    targets = [torch.zeros(spec.batch, *spec.shape) for _ in range(3)]
    file = os.open(Path(spec.folder) / "raw.bin", os.O_RDONLY)

    def epoch() -> Iterator[Tensor]:
        for number, first in enumerate(range(0, spec.samples, at_once)):
            content = buffers[number % len(buffers)][: min(at_once, spec.samples - first) * size]
            os.preadv(file, [content], first * size)
            xxhash.xxh3_64_hexdigest(content)
            for batch in torch.from_numpy(content).view(torch.float16).view(-1, *spec.shape).split(spec.batch):
                targets.append(targets.pop(0))
                for target, part in zip(targets[0].split(block), batch.split(block), strict=True):
                    target.copy_(part).mul_(SCALE)
                yield targets[0]

    while True:
        yield epoch()


def ours(spec: Spec, raw: bool) -> Iterator[Iterator[Tensor]]:
    """LatentStream; with `raw` only its order, reading, checksums and batching.

    Each epoch has a new stream, so that every member is read again: real datasets do not fit into memory.
    """
    from rdm_scale.data import LatentStream
    from rdm_scale.data.assembly import stack_raw

    class RawStream(LatentStream):
        def assemble(self, plan: Any, samples: Any) -> Any:
            return types.SimpleNamespace(latents=stack_raw(samples, spec.shape, torch.float16))

    kind = RawStream if raw else LatentStream
    steps = spec.samples // spec.batch
    for epoch in range(sys.maxsize):
        options = {"global_batch_size": spec.batch, "seed": 1, "start_step": epoch * steps}
        stream = kind(Path(spec.folder) / "ours", **options)
        yield (batch.latents for batch in islice(stream, steps))
        stream.close()


def webdataset(spec: Spec) -> Iterator[Iterator[Tensor]]:
    """Webdataset on the shards of LatentStream, shuffled by shards and within a buffer, without checksums."""
    import safetensors.torch
    import webdataset as wds

    urls = sorted(map(str, (Path(spec.folder) / "ours").glob("shard-*.tar")))
    for epoch in range(sys.maxsize):
        members = wds.WebDataset(urls, shardshuffle=len(urls), seed=epoch)
        samples = (row for m in members for row in safetensors.torch.load(m["safetensors"])["latents"])
        yield batched(wds.shuffle(SHUFFLED_AT_A_TIME, initial=SHUFFLED_AT_A_TIME)(samples), spec.batch)


def mds(spec: Spec) -> Iterator[Iterator[Tensor]]:
    """MosaicML's StreamingDataset, iterated directly: its DataLoader would add to that."""
    streaming = import_streaming()
    streaming.base.util.clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(
        local=f"{spec.folder}/mds", shuffle=True, batch_size=spec.batch, cache_limit=None
    )
    while True:
        yield batched((sample["latents"] for sample in dataset), spec.batch)


def litdata(spec: Spec) -> Iterator[Iterator[Tensor]]:
    """Litdata's StreamingDataset, iterated directly."""
    from litdata import StreamingDataset

    dataset = StreamingDataset(f"{spec.folder}/litdata", shuffle=True, seed=1)
    while True:
        yield batched(iter(dataset), spec.batch)


def batched(samples: Iterator[Any], size: int) -> Iterator[Tensor]:
    batch: list[Any] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == size:
            yield torch.stack(batch) if isinstance(sample, Tensor) else torch.from_numpy(np.stack(batch))
            batch = []


LOADERS = {
    "np.memmap": memmap,
    "np.memmap raw": memmap,
    "bare passes": bare,
    "ours": partial(ours, raw=False),
    "ours raw": partial(ours, raw=True),
    "webdataset": webdataset,
    "mds": mds,
    "mds raw": mds,
    "litdata": litdata,
    "litdata raw": litdata,
}


def import_streaming() -> Any:
    """Import `streaming` with stubs for torchvision and transformers, which it needs only for unused classes."""
    stubs = {
        "torchvision.datasets": ["VisionDataset", "CIFAR10"],
        "torchvision.transforms.functional": ["to_tensor"],
        "transformers.models.auto.tokenization_auto": ["AutoTokenizer"],
        "transformers.feature_extraction_utils": ["BatchFeature"],
        "transformers.tokenization_utils_base": ["BatchEncoding"],
    }
    for name, attributes in stubs.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        for attribute in attributes:
            setattr(sys.modules[name], attribute, type(attribute, (), {}))
    import streaming

    return streaming


def write(name: str, spec: Spec) -> None:
    latents = spec.raw()
    if name == "mds":
        encoding = f"ndarray:float16:{','.join(map(str, spec.shape))}"
        with import_streaming().MDSWriter(out=f"{spec.folder}/mds", columns={"latents": encoding}) as writer:
            for sample in latents:
                writer.write({"latents": np.array(sample)})
        return
    from litdata import optimize

    optimize(
        partial(_tensor, spec),
        inputs=list(range(spec.samples)),
        output_dir=f"{spec.folder}/litdata",
        chunk_bytes="64MB",
        num_workers=1,
        verbose=False,
    )


def _tensor(spec: Spec, index: int) -> Tensor:
    return torch.from_numpy(np.array(spec.raw()[index]))


def read(name: str, spec: Spec) -> None:
    torch.set_num_threads(1)
    epochs = LOADERS[name](spec)
    expected = np.sort(spec.raw()[:, 0, 0, 0, :2].astype(np.float32).sum(1))
    for line in sys.stdin:
        checked = line.strip() == "check"
        got: list[Tensor] = []
        epoch = next(epochs)
        count, wall, cpu = 0, time.perf_counter(), time.process_time()
        for batch in epoch:
            if not name.endswith(" raw"):
                batch = batch if name in ("ours", "bare passes") else batch.float().mul_(SCALE)
                assert batch.dtype == torch.float32
            count += len(batch)
            if checked:
                got.append(batch[:, 0, 0, 0, :2].float().sum(1) / (1 if name.endswith(" raw") else SCALE))
        answer = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
        if count != spec.samples:
            raise SystemExit(f"{name} gave {count} samples an epoch instead of {spec.samples}")
        if checked and not np.allclose(np.sort(torch.cat(got).numpy()), expected, atol=1e-4):
            raise SystemExit(f"{name} did not give every sample once")
        print("@" + json.dumps(answer), flush=True)
    os._exit(0)  # some loaders' threads never end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("write", "read"))
    parser.add_argument("name", help="loader")
    parser.add_argument("spec", type=json.loads, help="Spec as JSON")
    options = parser.parse_args()
    (write if options.action == "write" else read)(options.name, Spec(**options.spec))


if __name__ == "__main__":
    main()
