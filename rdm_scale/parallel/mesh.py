"""Mesh of ranks along the tensor, pipeline and data axes, and what all ranks must agree on."""

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from rdm_scale import __version__
from rdm_scale.config import ParallelConfig, RunConfig
from rdm_scale.device import local_device
from rdm_scale.errors import ConfigError, RdmError, StopRequested
from rdm_scale.parallel import megatron_adapter as megatron
from rdm_scale.parallel.failures import FailureReporter
from rdm_scale.parallel.hosts import Hosts
from rdm_scale.parallel.megatron_adapter import AxisGroup
from rdm_scale.parallel.rendezvous import meet

_CLOCK_S = 10.0  # clocks that differ by less are taken for the same
_LEFT, _LEAVING_S = "left", 5.0
_LIBRARIES = ("torch", "deepspeed", "megatron-core")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Mesh:
    """Position of this rank in the mesh, with its process groups.

    Ranks that differ only in `data_rank` hold the same part of the model and work on different samples; the ranks of
    one `data_rank` hold the model together (a model replica) and work on the same samples.
    """

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    tensor_group: dist.ProcessGroup
    pipeline_rank: int
    pipeline_size: int
    pipeline_group: dist.ProcessGroup
    data_rank: int
    data_size: int
    data_group: dist.ProcessGroup
    shard: AxisGroup  # data-parallel ranks over which ZeRO shards
    copies: AxisGroup  # data-parallel ranks that hold a copy of the same shard
    replica_group: dist.ProcessGroup  # ranks of one model replica
    store: dist.Store
    hosts: Hosts
    device: torch.device
    timeout: timedelta  # of every collective, and of a message between stages

    @property
    def is_first(self) -> bool:
        """True for the one rank that writes what is not sharded."""
        return self.rank == 0

    @property
    def reads_data(self) -> bool:
        """True for the one rank of each model replica that reads samples and broadcasts them to its peers."""
        return self.tensor_rank == 0 and self.pipeline_rank == 0

    @property
    def replica_size(self) -> int:
        """Number of ranks that hold the model together, and work on the same samples."""
        return self.world_size // self.data_size

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over all ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def all_reduce_tensor(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over all ranks, in place and on the device; reads nothing."""
        dist.all_reduce(values)
        return values

    def all_reduce_sum_on_cpu(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise float64 sum over all ranks, on the CPU."""
        total = values.to(self.device, torch.float64, copy=True)
        dist.all_reduce(total)
        return total.cpu()

    def all_reduce_sum_over_data(self, values: Sequence[float] | torch.Tensor) -> torch.Tensor:
        """Element-wise float64 sum over the data-parallel ranks, on the CPU."""
        total = torch.as_tensor(values, dtype=torch.float64).to(self.device)
        dist.all_reduce(total, group=self.data_group)
        return total.cpu()

    def stop_if_any(self, requested: bool) -> None:
        """Raise StopRequested on every rank if any of them was asked to stop. Collective."""
        if self.all_reduce_sum([float(requested)])[0] > 0:
            raise StopRequested

    def own_store(self) -> Any:
        """A connection of its own to the ranks' store, for a thread."""
        store: Any = self.store  # torch's stubs lack clone
        return store.clone()

    def all_gather_object(self, value: Value) -> list[Value]:
        """Small objects of all ranks, in rank order, on every rank. They are pickled: never pass untrusted data."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def gather_rare(self, value: Value | None) -> dict[int, Value]:
        """Objects of the ranks that have one, by rank, on every rank. Collective; without any, one small all-reduce."""
        if self.all_reduce_sum([float(value is not None)])[0] == 0:
            return {}
        return {rank: each for rank, each in enumerate(self.all_gather_object(value)) if each is not None}

    def on_first(self, work: Callable[[], Value]) -> Value:
        """Result of `work` on rank 0, on every rank: for what all ranks would read alike. Collective.

        Raises:
            RdmError: that of `work`, on every rank.
        """
        outcome: tuple[Value | None, RdmError | None] = (None, None)
        if self.is_first:
            try:
                outcome = work(), None
            except RdmError as error:
                outcome = None, error
        value, failure = self.broadcast(outcome)
        if failure is not None:
            raise failure
        return cast(Value, value)

    def broadcast(self, value: Value | None) -> Value:
        """Small object of rank 0, on every rank; the value of other ranks is ignored."""
        objects: list[Any] = [value]
        dist.broadcast_object_list(objects, src=0)
        return objects[0]

    def shutdown(self) -> None:
        """Wait for all ranks, then destroy the process groups."""
        self.all_reduce_sum([0.0])  # dist.barrier would guess which GPU is this rank's
        megatron.destroy_axes()
        dist.destroy_process_group()
        # Rank 0 holds the store: it leaves last, so that the others do not warn of a broken connection.
        if not self.is_first:
            self.store.add(_LEFT, 1)
        deadline = time.monotonic() + _LEAVING_S
        while self.is_first and self.store.add(_LEFT, 0) < self.world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.01)


def build_mesh(config: ParallelConfig, reporter: FailureReporter | None = None) -> Mesh:
    """Join the other ranks (gloo, or NCCL where there are GPUs) and build the mesh.

    Needs the environment variables that torchrun and deepspeed set; without any, the world is this process.

    Args:
        reporter: is given the store by which ranks report failures; its request to stop ends the wait for other ranks.

    Raises:
        LaunchError: not all ranks have come within `parallel.start_timeout_s`.
    """
    device = local_device()
    use_cuda = device.type == "cuda"
    _default_environment(use_cuda, config.tensor)
    if use_cuda:
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=config.timeout_s)
    met = meet(config.start_timeout_s, None if reporter is None else reporter.stop)
    if reporter is not None:
        reporter.watch(met.reports, met.hosts)
    if met.interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", met.interface)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "nccl" if use_cuda else "gloo",
        store=dist.PrefixStore("groups", met.store),
        rank=rank,
        world_size=world,
        timeout=timeout,
    )
    groups = megatron.initialize_axes(config.tensor, config.pipeline, timeout)
    shard, copies = _shard_groups(config, groups.data)
    return Mesh(
        rank=rank,
        world_size=world,
        tensor_rank=groups.tensor.rank,
        tensor_size=groups.tensor.size,
        tensor_group=groups.tensor.group,
        pipeline_rank=groups.pipeline.rank,
        pipeline_size=groups.pipeline.size,
        pipeline_group=groups.pipeline.group,
        data_rank=groups.data.rank,
        data_size=groups.data.size,
        data_group=groups.data.group,
        shard=shard,
        copies=copies,
        replica_group=groups.replica,
        store=met.store,
        hosts=met.hosts,
        device=device,
        timeout=timeout,
    )


def _shard_groups(config: ParallelConfig, data: AxisGroup) -> tuple[AxisGroup, AxisGroup]:
    """Groups within which states are sharded, of consecutive data-parallel ranks, and between which they are copied."""
    size = 1 if config.zero_stage == 0 else config.shard_size or data.size
    ranks = dist.get_process_group_ranks(data.group)
    within = _subgroup(data, ranks[data.rank // size * size :][:size])
    return within, _subgroup(data, ranks[data.rank % size :: size])


def _subgroup(data: AxisGroup, members: list[int]) -> AxisGroup:
    if len(members) == data.size:
        return data
    group = dist.new_group(members, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return AxisGroup(group, dist.get_rank(group), len(members))


def check_agreement(mesh: Mesh, config: RunConfig) -> None:
    """Raise ConfigError on every rank unless all ranks hold the same configuration and library versions."""
    own = {"configuration": config.digest(), "rdm_scale": __version__}
    own |= {name: metadata.version(name) for name in _LIBRARIES}
    first, first_host = mesh.broadcast((own, socket.gethostname()))
    differing = [f"{name}: {own[name]} against {first[name]}" for name in first if own[name] != first[name]]
    where = f"rank {mesh.rank} on {socket.gethostname()} and rank 0 on {first_host} differ in"
    found = mesh.gather_rare(f"{where} {differing[0]}" if differing else None)
    if found:
        raise ConfigError(f"{found[min(found)]}; start all ranks with the same files and versions")


def clock_warnings(mesh: Mesh) -> list[str]:
    """One line for each host whose clock is not that of rank 0. Collective."""
    mesh.all_reduce_sum([0.0])  # so that no rank waits for another one between the broadcast and its look at the clock
    ahead_s = time.time() - mesh.broadcast(time.time())
    line = (
        f"the clock of {socket.gethostname()} is {ahead_s:+.0f} s off that of rank 0: times in logs do not compare, "
        "and S3 refuses requests at 15 minutes; set the clocks by a time server (NTP)"
    )
    return sorted(set(mesh.gather_rare(line if abs(ahead_s) > _CLOCK_S else None).values()))


def _default_environment(use_cuda: bool, tensor: int) -> None:
    if tensor > 1:
        # Makes a kernel wait for the collective launched before it; megatron's layers rely on that to overlap the two.
        # Without them it would keep the collectives of ZeRO from running beside kernels.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if not use_cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # DeepSpeed asks for the number of devices in every reduction, and would start `numactl` each time to learn it.
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
