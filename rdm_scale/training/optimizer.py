"""AdamW and its learning rate."""

import importlib.util
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rdm_scale.config import ModelConfig, OptimizerConfig
from rdm_scale.models.parameterization import Rates, depth_ratio, rates, width_ratio

# Learning-rate schedules: remaining share of the decay, from 1 to 0, by progress from 0 to 1.
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
}


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Learning rate of step `step`, counted from 1.

    Linear warm-up to `lr` at step `warmup_steps`; then constant, or down to lr * final_lr_ratio at `schedule_steps`
    along a line or half a cosine, and constant from there.
    """
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant" or config.schedule_steps is None:
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / (config.schedule_steps - config.warmup_steps))
    remaining = DECAYS[config.schedule](progress)
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * remaining)


def takes_decay(name: str) -> bool:
    """True if the parameter of this logical name has weight decay: weight matrices, not gates, biases or embeddings."""
    return name.endswith(".weight") and not name.startswith("class_embed.")


def build_optimizer(
    config: OptimizerConfig, model_config: ModelConfig, model: nn.Module, *, on_host: bool = False
) -> torch.optim.Optimizer:
    """Build NVIDIA apex's FusedAdam on GPUs where it is installed, PyTorch's fused AdamW otherwise.

    Parameters with the same rates share a group; its `lr_scale` is the ratio of its learning rate to the scheduled one.

    Args:
        on_host: the update runs on the CPU, wherever the model is.
    """
    w, r = width_ratio(model_config), depth_ratio(model_config)
    members: dict[tuple[Rates, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        members[rates(name, w, r), takes_decay(name)].append(parameter)
    groups = [
        {
            "params": parameters,
            "lr": config.lr * scale.lr,
            "lr_scale": scale.lr,
            "eps": config.eps * scale.eps,
            "weight_decay": config.weight_decay * scale.decay if decays else 0.0,
        }
        for (scale, decays), parameters in members.items()
    ]
    if not on_host and next(model.parameters()).is_cuda and (fused_adam := apex_adam()):
        return fused_adam(groups, lr=config.lr, betas=config.betas, eps=config.eps, adam_w_mode=True)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def apex_adam() -> Any:
    """FusedAdam of NVIDIA apex, or None if that is not installed; the `apex` on PyPI is another package."""
    if importlib.util.find_spec("apex") is None or importlib.util.find_spec("apex.optimizers") is None:
        return None
    from apex.optimizers import FusedAdam

    return FusedAdam
