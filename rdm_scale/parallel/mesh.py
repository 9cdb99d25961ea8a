"""Mesh of ranks along the tensor, pipeline and data axes, and what all ranks must agree on."""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rdm_scale import __version__
from rdm_scale.config import ParallelConfig, RunConfig
from rdm_scale.device import local_device
from rdm_scale.errors import ConfigError
from rdm_scale.parallel import megatron_adapter as megatron
from rdm_scale.parallel.failures import FailureReporter
from rdm_scale.parallel.megatron_adapter import AxisGroup

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

    def all_gather_object(self, value: Value) -> list[Value]:
        """Small objects of all ranks, in rank order, on every rank. They are pickled: never pass untrusted data."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

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


def build_mesh(config: ParallelConfig, reporter: FailureReporter | None = None) -> Mesh:
    """Join the other ranks (gloo, or NCCL where there are GPUs) and build the mesh.

    Needs the environment variables that torchrun and deepspeed set; without any, the world is this process.

    Args:
        reporter: is given the store that the ranks share.
    """
    device = local_device()
    use_cuda = device.type == "cuda"
    _default_environment(use_cuda, config.tensor)
    if use_cuda:
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=config.timeout_s)
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    if reporter is not None:
        reporter.store = store
    dist.init_process_group(
        "nccl" if use_cuda else "gloo",
        store=dist.PrefixStore("rdm_scale", store),
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
    all_ranks = mesh.all_gather_object((own, socket.gethostname()))
    first, first_host = all_ranks[0]
    for rank, (found, host) in enumerate(all_ranks):
        for name in first:
            if found[name] != first[name]:
                raise ConfigError(
                    f"rank {rank} on {host} and rank 0 on {first_host} differ in {name}: "
                    f"{found[name]} against {first[name]}; start all ranks with the same files and versions"
                )


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
