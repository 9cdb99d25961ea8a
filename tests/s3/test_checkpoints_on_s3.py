"""Checkpoints on an S3 server that fails while they are saved."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rdm_scale.checkpoint.directory import CheckpointDirectory
from rdm_scale.checkpoint.format.slices import Region, SliceTable, TensorSlice
from rdm_scale.checkpoint.format.writer import write_tensors
from rdm_scale.checkpoint.ownership import OWNER, Ownership, refuse_other_owner
from rdm_scale.config import RunConfig
from rdm_scale.errors import CheckpointError, OwnershipError
from rdm_scale.storage.location import Location, ReplacedError, Retry, retrying
from rdm_scale.tools.s3_server import S3Server
from tests.support.fault_proxy import Fault, FaultProxy, Request
from tests.support.limits import HANG_S
from tests.support.rank_pool import RankPool
from tests.support.small_runs import metrics, run_config, train, write_latents

TRANSIENT = [
    Fault("status", status=503, code="SlowDown"),
    Fault("status", status=500, code="InternalError"),
    Fault("reset"),
]


def writes(request: Request) -> bool:
    return request.method in ("PUT", "POST")


def save(directory: CheckpointDirectory, step: int, elements: int) -> None:
    item = TensorSlice("w", (elements,), Region((0,), (elements,)), 0)
    folder = directory.begin(step)
    records = write_tensors(
        folder, 0, SliceTable.of([item]), {"ema": torch.arange(elements, dtype=torch.float32) + step}
    )
    directory.commit(step, {"step": step}, records)


@pytest.mark.parametrize("elements", [1000, 30_000_000], ids=["one request", "multipart"])
@pytest.mark.parametrize("fault", TRANSIENT, ids=lambda f: f"{f.kind} {f.status}")
def test_transient_faults_are_retried(proxy: FaultProxy, prefix: str, fault: Fault, elements: int) -> None:
    directory = CheckpointDirectory(Location(f"s3://latents/{prefix}"))
    proxy.add(fault, writes, times=2)
    save(directory, 1, elements)
    assert sum(request.fault is not None for request in proxy.requests) == 2
    _, reader = directory.open(1)
    assert torch.equal(reader.read("ema", "w"), torch.arange(elements, dtype=torch.float32) + 1)


@pytest.mark.full  # uploads are retried for 45 s
def test_permanent_faults_are_reported_and_leave_earlier_checkpoints(proxy: FaultProxy, prefix: str) -> None:
    directory = CheckpointDirectory(Location(f"s3://latents/{prefix}"))
    save(directory, 1, 1000)
    proxy.add(TRANSIENT[0], lambda r: writes(r) and "rank_00000.safetensors" in r.path)
    with (
        retrying(Retry(attempts=3, first_wait_s=0.01, budget_s=5)),
        pytest.raises(CheckpointError, match=r"cannot write s3://.*rank_00000"),
    ):
        save(directory, 2, 1000)
    proxy.clear()
    step, reasons = directory.newest()
    assert step == 1 and all("no commit.json" in reason for reason in reasons)
    save(directory, 2, 1000)
    assert directory.steps() == [1, 2]


def test_one_run_owns_a_prefix_by_conditional_writes(proxy: FaultProxy, prefix: str) -> None:
    root = Location(f"s3://latents/{prefix}")
    refuse_other_owner(root, None, take_over=False)
    with Ownership.claim(root, "a", "runs/a", lease_s=0.6) as owner:
        stale = (root / OWNER).stat().version
        with pytest.raises(OwnershipError, match="belong to the run in runs/a"):
            refuse_other_owner(root, "b", take_over=False)
        with pytest.raises(OwnershipError, match=r"was alive \d s ago"):
            Ownership.claim(root, "b", "runs/b", take_over=True)
        with pytest.raises(ReplacedError):
            (root / OWNER).write_if(b"x", None)
        proxy.add(TRANSIENT[0], writes, times=1)  # a renewal is retried
        deadline = time.monotonic() + HANG_S
        while not any(request.fault for request in proxy.requests):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        owner.confirm()
        Ownership.claim(root, "a", "runs/a").close()  # the same run, at once
        with pytest.raises(OwnershipError, match="taken over"):
            owner.confirm()
        with pytest.raises(ReplacedError):
            (root / OWNER).write_if(b"x", stale)
    assert root.names() == [OWNER]


def train_on_s3(config: RunConfig, environment: dict[str, str]) -> None:
    os.environ |= environment
    train(config)


def test_a_run_continues_without_a_checkpoint_that_the_store_refuses(
    ranks: RankPool, s3_server: S3Server, proxy: FaultProxy, prefix: str, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "train__steps": 7,
        "checkpoint__dir": f"s3://latents/{prefix}",
        "checkpoint__every": 2,
        "checkpoint__keep": 0,
        "checkpoint__on_failure": "continue",
    }
    data = write_latents(tmp_path / "latents")
    config = run_config(tmp_path, data, **changes)
    refused = Fault("status", status=403, code="AccessDenied")
    proxy.add(refused, lambda r: writes(r) and "step_00000004/rank_00001" in r.path)
    environment = s3_server.environment(proxy.endpoint)
    ranks.run(2, train_on_s3, config, environment)
    directory = CheckpointDirectory(Location(f"s3://latents/{prefix}"))
    assert directory.steps() == [2, 6, 7]
    uninterrupted = run_config(tmp_path / "uninterrupted", data, train__steps=9)
    ranks.run(2, train, uninterrupted)
    proxy.clear()
    ranks.run(2, train_on_s3, run_config(tmp_path, data, **(changes | {"train__steps": 9})), environment)
    assert metrics(config.run.dir) == metrics(uninterrupted.run.dir)
