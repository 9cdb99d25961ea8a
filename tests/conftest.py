"""Fixtures of several folders: real ranks, sets of latents by the real writer, and an object store in memory."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share two cores; read when torch is imported

import fsspec
import pytest
import torch

from rdm_scale.data.shard_writer import ShardWriter
from rdm_scale.dtypes import STORED_DTYPES
from rdm_scale.storage.location import Location
from tests.support.latent_sets import IDENTITY, LatentSet, WriteSet
from tests.support.rank_pool import RankPool
from tests.support.small_runs import add_captions, write_latents

TESTS = Path(__file__).parent
# What starts ranks, servers, tools or other processes gets the mark `processes`, which `make test-quick` leaves out.
PROCESS_FOLDERS = ("cluster", "distributed", "gpu", "s3", "tools")
PROCESS_FILES = ("test_mutations.py", "test_packaging.py", "test_written_before.py")
PROCESS_FIXTURES = {"ranks", "s3_server"}


def pytest_configure(config: pytest.Config) -> None:
    """All tests but those of tests/gpu are of the CPU, on a machine with GPUs too."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start processes, by their folder, file or fixtures, and group what shares a worker.

    Tests of one file share its fixtures and so a worker, but for those of layouts, which are better spread.
    """
    for item in items:
        place = item.path.relative_to(TESTS).parts
        fixtures = set(getattr(item, "fixturenames", ()))
        if place[0] in PROCESS_FOLDERS + PROCESS_FILES or fixtures & PROCESS_FIXTURES:
            item.add_marker("processes")
        if place[0] != "distributed":
            item.add_marker(pytest.mark.xdist_group(str(item.path)))


@pytest.fixture(scope="session")
def ranks() -> RankPool:
    return RankPool()


@pytest.fixture
def write_set(tmp_path: Path) -> WriteSet:
    """write_set(samples, place=..., kind=..., ...) writes random latents with ids 1000, 1001, ..."""

    def write(samples: int, place: Location | None = None, add: int = 7, **changes: Any) -> LatentSet:
        options: dict[str, Any] = {
            "kind": "mode",
            "dtype": "float32",
            "shape": (2, 1, 3, 3),
            "codec": IDENTITY,
            "class_names": ("zero", "one", "two"),
            "samples_per_member": 4,
            "members_per_shard": 3,
        } | changes
        C, T, H, W = options["shape"]
        stored = (samples, 2 * C if options["kind"] == "moments" else C, T, H, W)
        generator = torch.Generator().manual_seed(samples)
        latents = torch.randn(stored, generator=generator).to(STORED_DTYPES[options["dtype"]].torch)
        ids, labels = torch.arange(samples) + 1000, torch.arange(samples) % 4 - 1
        folder = place or Location(tmp_path / f"set-{uuid.uuid4().hex}")
        writer = ShardWriter(folder, **options)
        for first in range(0, samples, add):
            writer.add(*(values[first : first + add] for values in (latents, ids, labels)))
        return LatentSet(folder, writer.close(), latents, ids, labels)

    return write


@pytest.fixture
def captioned(tmp_path: Path) -> str:
    """The manifest of 48 samples with the captions of `caption_of`."""
    data = write_latents(tmp_path / "captioned", samples=48)
    add_captions(data)
    return data


@pytest.fixture
def memory() -> Iterator[Location]:
    """A folder on fsspec's file system in memory: an object store as far as this package is concerned."""
    location = Location(f"memory://{uuid.uuid4().hex}")
    yield location
    fs = fsspec.filesystem("memory")
    if fs.exists(location.path):
        fs.rm(location.path, recursive=True)
