"""Hyperparameter transfer: learning rate, weight decay and epsilon as functions of a model's size.

A run that names the size at which `optimizer.*` was tuned (`model.base_depth`, `model.base_width`) is trained by
CompleteP (arXiv 2505.01618, table 1), which for diffusion transformers is muP (arXiv 2505.15270) with depth added. With
w = width / base width and r = base branches / branches:

    residual branches              times r              (models/gates.py: alpha and beta)
    matrices whose inputs grow     learning rate / w, decay * w (so that their product stays), epsilon / w
    everything else                learning rate and decay as they are, epsilon / w
    parameters of blocks           epsilon * r besides: their gradients shrink with the branches
    the last layer                 epsilon as it is: its gradients do not shrink with the width

A model of the base's size equals one without a base. The size of a head should stay the same: width adds heads.
Scalar gates, and scales of queries and keys, have gradients that shrink less than 1 / w: their epsilon is lower than it
need be.
"""

from typing import NamedTuple

from rdm_scale.config import ModelConfig

# Matrices with the same number of inputs at every width: sizes of a patch, of an embedding, of a caption's tokens.
_FIXED_INPUTS = ("patch_embed", "class_embed", "timestep_embed.hidden", "text_embed.hidden", "branch.kv")


class Rates(NamedTuple):
    """Factors on the learning rate, the weight decay and Adam's epsilon of one parameter."""

    lr: float
    decay: float
    eps: float


def width_ratio(config: ModelConfig) -> float:
    """w: width divided by the base width."""
    return config.hidden_size / (config.base_width or config.hidden_size)


def depth_ratio(config: ModelConfig) -> float:
    """r: residual branches of the base divided by those of the model."""
    return config.base_branches / config.branches


def inputs_grow(name: str) -> bool:
    """True if the parameter of this logical name is a matrix whose number of inputs grows with the width."""
    return name.endswith(".weight") and not name.removesuffix(".weight").endswith(_FIXED_INPUTS)


def rates(name: str, w: float, r: float) -> Rates:
    """Rates of the parameter of this logical name for ratios w and r; all 1 without a base."""
    eps = (1 if name.startswith("head.out.") else 1 / w) * (r if name.startswith("blocks.") else 1)
    return Rates(1 / w, w, eps) if inputs_grow(name) else Rates(1, 1, eps)
