"""Share of encoding time spent in the VAE, and the stage that bounds a job if that share is small.

Runs the encoding job (`rdm_scale.encoding.runner`) on synthetic JPEGs, with a VAE of the size of Stable Diffusion's and
with a tiny one, both with random weights. Timing starts after models are loaded and inputs listed, and ends when the
manifest is written. Reading the first batch and writing the last shard cannot overlap with the VAE, so its share grows
with the number of images.

The worker's trace times each stage: wall time of the main thread (VAE, statistics, waiting), CPU time of the threads
that read and of the one that writes. The VAE bounds the job if its wall time is almost that of the job; reading bounds
it if all cores are busy, mostly with reading, while the main thread waits. Prints Markdown, writes
benchmarks/results/encoding.json.

    python benchmarks/encoding.py --images 32 --tiny-images 1024
"""

import argparse
import io
import os
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.report import print_table, write_results
from rdm_scale.codecs import load_codec
from rdm_scale.device import local_device
from rdm_scale.encoding.inputs import find_media
from rdm_scale.encoding.job import EncodingJob
from rdm_scale.encoding.output import OutputFolders
from rdm_scale.encoding.planning import EncodingSettings, PixelBucket
from rdm_scale.encoding.runner import encode
from rdm_scale.encoding.worker import WorkerStage
from rdm_scale.storage.location import Location

STAGES: dict[WorkerStage, str] = {
    "encode": "VAE",
    "load": "reading and decoding",
    "write": "packing and writing",
    "statistics": "statistics",
    "wait": "waiting for pixels",
    "collate": "putting batches together",
}
JPEG_SIZE = (384, 512)  # height and width: cropped and resized to the size that is encoded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32, help="encoded by the VAE of SD's size")
    parser.add_argument("--tiny-images", type=int, default=1024, help="encoded by the tiny VAE")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    options = parser.parse_args()
    result: dict[str, Any] = vars(options) | {"cores": os.cpu_count(), "torch": torch.__version__}
    result["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result["threads"] = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for vae, images in (("AutoencoderKL", options.images), ("AutoencoderTiny", options.tiny_images)):
            write_jpegs(folder / f"{vae}-images", images)
            save_vae(vae, folder / vae)
            job = job_of(folder / f"{vae}-images", folder / vae, folder / f"{vae}-latents", options)
            result[vae] = measure(job, images)
    report(result)
    write_results(__file__, result)


def save_vae(name: str, folder: Path) -> None:
    import diffusers  # takes seconds to import

    torch.manual_seed(0)
    if name == "AutoencoderTiny":
        vae = diffusers.AutoencoderTiny(latent_channels=4)
    else:
        widths = (128, 256, 512, 512)
        vae = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=widths,
            layers_per_block=2,
            latent_channels=4,
        )
    vae.save_pretrained(folder)


def write_jpegs(folder: Path, count: int) -> None:
    """Smooth noise, which is about as large as a photograph: 80 KB."""
    folder.mkdir()
    height, width = JPEG_SIZE

    def write(i: int) -> None:
        rng = np.random.default_rng(i)
        coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        noisy = (pixels + rng.integers(-12, 13, pixels.shape)).clip(0, 255).astype(np.uint8)
        content = io.BytesIO()
        Image.fromarray(noisy).save(content, "JPEG", quality=90)
        (folder / f"{i:06d}.jpg").write_bytes(content.getvalue())

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(count)))


def job_of(images: Path, vae: Path, output: Path, options: argparse.Namespace) -> EncodingJob:
    source = find_media(str(images))
    settings = EncodingSettings((PixelBucket(1, options.size, options.size),), batch_size=options.batch_size)
    codec = load_codec(str(vae), local_device())
    return EncodingJob.create(source, settings, codec, OutputFolders(Location(output)))


def measure(job: EncodingJob, images: int) -> dict[str, Any]:
    """Wall and CPU seconds of the job, and of its stages."""
    job.codec.encode(torch.zeros(1, 3, 1, *job.settings.buckets[0][1:]))  # initialization of libraries
    times = StageTimes()
    wall, cpu = time.perf_counter(), time.process_time()
    encode(job, trace=times)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    stage = {name: dict(zip(("wall_s", "cpu_s"), spent, strict=True)) for name, spent in times.spent.items()}
    main_thread = stage["VAE"]["wall_s"] + stage["waiting for pixels"]["wall_s"]
    return {
        "images": images,
        "wall_s": wall,
        "cpu_s": cpu,
        "images_per_s": images / wall,
        "vae_share": stage["VAE"]["wall_s"] / wall,
        "waiting_share": stage["waiting for pixels"]["wall_s"] / wall,
        "rest_share": 1 - main_thread / wall,
        "cores_busy": cpu / wall,
        "stages": stage,
    }


class StageTimes:
    """Wall and CPU seconds of each stage, summed over its threads. A trace of `rdm_scale.encoding.worker`."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # stage: [wall, CPU]
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, stage: WorkerStage) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            yield
            if stage == "encode" and torch.cuda.is_available():
                torch.cuda.synchronize()
        finally:
            with self._lock:
                self.spent[STAGES[stage]][0] += time.perf_counter() - wall
                self.spent[STAGES[stage]][1] += time.thread_time() - cpu


def report(result: dict[str, Any]) -> None:
    print(f"\n{result['size']} px, batches of {result['batch_size']}, {result['threads']} threads")
    vaes = ("AutoencoderKL", "AutoencoderTiny")
    rows: list[tuple[object, ...]] = []
    for vae in vaes:
        row = result[vae]
        shares = [f"{row[name]:.1%}" for name in ("vae_share", "waiting_share", "rest_share")]
        busy = f"{row['cores_busy']:.2f} of {result['cores']}"
        rows.append((vae, row["images"], f"{row['images_per_s']:.2f}", *shares, busy))
    header = ("images", "images/s", "in the VAE", "waiting", "rest of the main thread", "cores busy of all")
    print_table(("VAE", *header), rows)
    rows = []
    for stage in result[vaes[0]]["stages"]:
        times = [1e3 * result[vae]["stages"][stage]["cpu_s"] / result[vae]["images"] for vae in vaes]
        rows.append((stage, *(f"{time:.2f}" for time in times)))
    print_table(("CPU time an image (ms)", *vaes), rows)


if __name__ == "__main__":
    main()
