"""Inputs and jobs for the tests of encoding."""

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from rdm_scale.codecs import load_codec
from rdm_scale.data.manifest import Manifest, read_manifest
from rdm_scale.data.shard_writer import sample_id
from rdm_scale.data.shards import read_member
from rdm_scale.encoding.inputs import MediaFile, MediaSet, find_media
from rdm_scale.encoding.job import EncodingJob, JobProgress
from rdm_scale.encoding.output import OutputFolders
from rdm_scale.encoding.planning import EncodingSettings, PixelBucket
from rdm_scale.encoding.text import TextEncoder
from rdm_scale.storage.location import Location
from tests.support.clip_files import digit_clip
from tests.support.limits import HANG_S

CLIP_FRAMES = 10


def write_digits(folder: Path, count: int, size: int = 8) -> None:
    """Scans of digits as PNGs in folders of their classes, `3/00013.png`."""
    for index, (scan, label) in enumerate(zip(*load_digits(return_X_y=True), strict=True)):
        if index == count:
            break
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((scan.reshape(8, 8) * 15).astype(np.uint8)).resize((size, size)).convert("RGB")
        image.save(folder / f"{label}/{index:05d}.png")


def write_clips(folder: Path, count: int) -> None:
    """`0.mp4`, ...: clips of moving digits, 10 frames at 24 a second, 32 x 32."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        (folder / f"{index}.mp4").write_bytes(digit_clip(index, frames=CLIP_FRAMES))


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def media(keys: list[str], labels: list[int] | None = None, kind: Any = "image") -> MediaSet:
    """A set that is planned with but never read."""
    place = Location("/nowhere")
    files = tuple(MediaFile(key, labels[i] if labels else -1, None, place, key) for i, key in enumerate(keys))
    return MediaSet(files, kind, tuple("0123456789") if labels else (), False)


def make_job(
    source: object,
    out: object,
    size: int = 8,
    *,
    codec: str = "identity",
    frames: int = 1,
    holdout: object = None,
    text: TextEncoder | None = None,
    max_rejected: float = 0.0,
    max_unreadable: float = 0.0,
    trust_inputs: bool = False,
    **settings: Any,
) -> EncodingJob:
    settings = {
        "buckets": (PixelBucket(frames, size, size),),
        "dtype": "float32",
        "batch_size": 7,
        "samples_per_member": 4,
        "members_per_shard": 3,
        "holdout_share": 0.3 if holdout else 0.0,
    } | settings
    output = OutputFolders(Location(str(out)), Location(str(holdout)) if holdout else None)
    return EncodingJob.create(
        find_media(str(source)),
        EncodingSettings(**settings),
        load_codec(codec),
        output,
        text,
        max_rejected,
        max_unreadable=max_unreadable,
        trust_inputs=trust_inputs,
    )


def read_all(out: object) -> tuple[Manifest, dict[str, Tensor]]:
    """A set of one shape: its manifest, and the samples of all members one after the other."""
    manifest, folder = read_manifest(str(out))
    members = [
        read_member(folder, manifest, s, m)
        for s, shard in enumerate(manifest.shards)
        for m in range(len(shard.members))
    ]
    return manifest, {name: torch.cat([member[name] for member in members]) for name in members[0]}


def contents(folder: Path) -> dict[str, bytes]:
    """The files of an output, without the folder by which jobs are resumed."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if not name.startswith(".encoding/")}


def pixels_of(path: Path) -> Tensor:
    """[3, 1, H, W] by PIL and numpy alone."""
    array = np.asarray(Image.open(path).convert("RGB")).astype(np.float32)
    return torch.from_numpy(array).permute(2, 0, 1).unsqueeze(1) / 127.5 - 1


def ids_of(folder: Path, suffix: str = "png", clip: int = 0, view: int = 0) -> dict[int, Path]:
    """The images of a folder by the ids of their samples."""
    return {
        sample_id(str(path.relative_to(folder).with_suffix("")), clip, view): path
        for path in folder.rglob(f"*.{suffix}")
    }


def assert_done(out) -> None:
    assert {path.name for path in out.iterdir()} - {"rejected.jsonl", ".encoding"} == {
        "manifest.json",
        *(tar.name for shard in read_manifest(str(out))[0].shards for tar in (shard, shard.text) if tar),
    }


def stop_after(job: EncodingJob, shards: int) -> JobProgress:
    """A progress that interrupts a job in the middle of a shard, when `shards` shards of 12 samples are recorded."""

    def records() -> int:
        return sum(name.endswith(".json") and name != "plan.json" for name in job.output.work.names())

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "encoding" and done >= 12 * shards + 4:
            deadline = time.monotonic() + HANG_S
            while records() < shards and time.monotonic() < deadline:  # the writing thread may be slow
                time.sleep(0.01)
            raise KeyboardInterrupt

    return progress
