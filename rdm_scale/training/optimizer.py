"""AdamW and its learning rate."""

import importlib.util
import math

import torch
from torch import nn

from rdm_scale.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Learning rate of the step that makes `step` steps complete (counted from 1).

    Linear warm-up to `lr` at step `warmup_steps`; then constant, or down to lr * final_lr_ratio at `schedule_steps`
    along a line or half a cosine, and constant from there.
    """
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant" or config.schedule_steps is None:
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / (config.schedule_steps - config.warmup_steps))
    remaining = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * remaining)


def takes_decay(name: str) -> bool:
    """Whether a parameter of this logical name decays: weight matrices do; gates, biases and embeddings do not."""
    return name.endswith(".weight") and not name.startswith("class_embed.")


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """NVIDIA apex's FusedAdam on GPUs where it is installed, PyTorch's fused AdamW otherwise."""
    decayed = [p for name, p in model.named_parameters() if takes_decay(name)]
    others = [p for name, p in model.named_parameters() if not takes_decay(name)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if decayed[0].is_cuda and importlib.util.find_spec("apex.optimizers"):
        from apex.optimizers import FusedAdam

        return FusedAdam(groups, lr=config.lr, betas=config.betas, eps=config.eps, adam_w_mode=True)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
