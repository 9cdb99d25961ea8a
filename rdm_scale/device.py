"""The device that a process computes on."""

import os

import torch

from rdm_scale.errors import ConfigError


def local_device() -> torch.device:
    """The GPU with this process's local rank (LOCAL_RANK as set by the launcher, else 0), or the CPU without a GPU.

    Raises:
        ConfigError: the launcher started more processes on this node than it has GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= gpus:
        raise ConfigError(
            f"this node has {gpus} GPUs, but the launcher started a process with LOCAL_RANK={local_rank}: start one "
            "rank per GPU, or set CUDA_VISIBLE_DEVICES= (empty) to run on the CPU"
        )
    return torch.device("cuda", local_rank)
