"""The device that a process computes on."""

import os

import torch

from rdm_scale.errors import ConfigError


def local_device() -> torch.device:
    """The GPU of this process's local rank (its launcher's LOCAL_RANK, or the first), or the CPU where there is none.

    Raises:
        ConfigError: the launcher started more processes on this node than it has GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= gpus:
        raise ConfigError(
            f"this node has {gpus} GPUs and was asked for more ranks: start one rank a GPU, "
            "or set CUDA_VISIBLE_DEVICES= (empty) to work on the CPU"
        )
    return torch.device("cuda", local_rank)
