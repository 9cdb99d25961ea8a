"""Training from an S3 server that fails in every way that may pass, and what ends it when it does not."""

import os
import random
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rdm_scale.config import RunConfig
from rdm_scale.data import contiguous_reader
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location
from rdm_scale.tools.s3_server import S3Server
from tests.support.fault_proxy import Fault, FaultProxy, Request
from tests.support.rank_pool import RankPool
from tests.support.small_runs import metrics, run_config, train, write_latents

KINDS = [
    Fault("status", status=503, code="SlowDown"),
    Fault("status", status=500, code="InternalError"),
    Fault("status", status=429, code="TooManyRequests"),
    Fault("reset"),
    Fault("drop", after=200),
    Fault("truncate", after=3000),
    Fault("stall", after=100),
    Fault("rate", bytes_per_s=2e4),
]


def train_on_s3(config: RunConfig, environment: dict[str, str]) -> list[list[int]]:
    """Trains; returns the ids of the samples of each step of this rank.

    Every epoch reads the set again, as if it were larger than the memory that small sets are kept in.
    """
    from rdm_scale.training.trainer import Trainer

    os.environ |= environment
    step, ids = Trainer.train_step, []

    def watched(self: Any, batches: Any) -> Any:
        def noted() -> Any:
            for batch in batches:
                ids.append(batch.ids.tolist())
                yield batch

        return step(self, noted())

    Trainer.train_step = watched  # type: ignore[method-assign]
    contiguous_reader.KEPT_BYTES = 1
    train(config)
    return ids


def upload(folder: Path, url: str) -> None:
    for path in sorted(folder.iterdir()):
        (Location(url) / path.name).write(path.read_bytes())


class Troubles:
    """Chooses at random which requests fail, and how; none more than twice, as the time for a read is limited."""

    def __init__(self, proxy: FaultProxy, share: float) -> None:
        self._random, self._share, self._failed = random.Random(7), share, Counter[str]()
        self._lock = threading.Lock()
        self.injected: Counter[str] = Counter()
        for fault in KINDS:
            proxy.add(fault, lambda request, fault=fault: self._strikes(request, fault))

    def _strikes(self, request: Request, fault: Fault) -> bool:
        key = f"{request.path} {request.range}"
        with self._lock:
            if self._failed[key] >= 2 or self._random.random() >= self._share / len(KINDS):
                return False
            self._failed[key] += 1
            self.injected[f"{fault.kind} {fault.status if fault.kind == 'status' else ''}"] += 1
            return True

    def forget(self) -> None:
        """Every range may fail again."""
        with self._lock:
            self._failed.clear()


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_two_hundred_faults_change_nothing(
    ranks: RankPool, s3_server: S3Server, proxy: FaultProxy, prefix: str, tmp_path: Path
) -> None:
    """The samples of every step, and so the losses to the last bit, are those of a run without faults."""
    local = Path(write_latents(tmp_path / "latents", samples=640)).parent
    url = f"s3://latents/{prefix}"
    upload(local, url)
    changes: dict[str, Any] = {"train__steps": 400, "data__workers": 2, "data__read_timeout_s": 30}
    environment = s3_server.environment(proxy.endpoint)
    quiet = run_config(tmp_path / "quiet", f"{url}/manifest.json", **changes)
    expected = ranks.run(2, train_on_s3, quiet, environment)
    troubles = Troubles(proxy, share=0.6)
    loud = run_config(tmp_path / "loud", f"{url}/manifest.json", **changes)
    done = threading.Event()

    def reminding() -> None:
        while not done.wait(5):
            troubles.forget()

    thread = threading.Thread(target=reminding, daemon=True)
    thread.start()
    try:
        found = ranks.run(2, train_on_s3, loud, environment, timeout_s=1200)
    finally:
        done.set()
    print(f"{troubles.injected.total()} faults: {dict(troubles.injected)}")
    assert troubles.injected.total() >= 200 and len(troubles.injected) == len(KINDS)
    assert found == expected
    assert metrics(loud.run.dir) == metrics(quiet.run.dir)


@pytest.mark.parametrize(
    "fault", [Fault("status", status=403, code="AccessDenied"), Fault("stall")], ids=lambda f: f.kind
)
def test_a_fault_that_stays_ends_every_rank(
    ranks: RankPool, s3_server: S3Server, proxy: FaultProxy, prefix: str, tmp_path: Path, fault: Fault
) -> None:
    url = f"s3://latents/{prefix}"
    upload(Path(write_latents(tmp_path / "latents")).parent, url)
    proxy.add(fault, lambda request: request.path.endswith("shard-000001.tar"))
    config = run_config(tmp_path / "run", f"{url}/manifest.json", data__read_timeout_s=12, train__steps=30)
    with pytest.raises(DataError, match=r"shard-000001\.tar"):
        ranks.run(2, train_on_s3, config, s3_server.environment(proxy.endpoint), timeout_s=240)
