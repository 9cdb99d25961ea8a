"""Trace of some training steps by torch's profiler, on chosen ranks (`train.profile`, `train.profile_ranks`)."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from rdm_scale.config import RunConfig
from rdm_scale.errors import ConfigError
from rdm_scale.parallel.mesh import Mesh

FOLDER = "profile"  # in the run's directory


class StepProfiler:
    """Records the steps to trace, and writes one file a rank, which chrome://tracing and Perfetto open.

    Raises:
        ConfigError: `train.profile_ranks` names a rank that does not exist.
    """

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        missing = [rank for rank in config.train.profile_ranks if rank >= mesh.world_size]
        if missing:
            raise ConfigError(f"train.profile_ranks names rank {missing[0]}, and the run has {mesh.world_size} ranks")
        self._folder, self._mesh = Path(config.run.dir) / FOLDER, mesh
        chosen = config.train.profile if mesh.rank in config.train.profile_ranks else None
        self._steps = range(0) if chosen is None else range(chosen[0], chosen[1] + 1)
        self._profile: profile | None = None
        self._recorded: list[int] = []

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Context of the work of one step."""
        if step not in self._steps:
            yield
            return
        if self._profile is None:
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if self._mesh.device.type == "cuda" else []
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.start()
        self._recorded.append(step)
        with record_function(f"step {step}"):
            yield
        if step == self._steps[-1]:
            self.write()

    def write(self) -> None:
        """Write what is recorded, if anything: at the last step to trace, or where the run ends before it."""
        if self._profile is None:
            return
        if self._mesh.device.type == "cuda":
            torch.cuda.synchronize()  # the device is still at work on the last step
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        first, last = self._recorded[0], self._recorded[-1]
        path = self._folder / f"steps_{first:08d}-{last:08d}_rank_{self._mesh.rank:05d}.json.gz"
        self._profile.export_chrome_trace(str(path))
        self._profile = None
        print(f"traced steps {first} to {last} on rank {self._mesh.rank}: {path}", flush=True)
