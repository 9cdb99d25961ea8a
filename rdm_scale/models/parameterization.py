"""How rates follow the size of a model, so that those found on a small one serve a large one.

A run that names the size at which `optimizer.*` was tuned (`model.base_depth`, `model.base_width`) is trained as
CompleteP says (arXiv 2505.01618, table 1), which for diffusion transformers is muP (arXiv 2505.15270) with depth
added. With w = width / base width and r = base branches / branches:

    every way into the stream      times r              (models/gates.py: alpha and beta)
    matrices whose inputs grow     learning rate / w, decay * w (so that their product stays), epsilon / w
    everything else                learning rate and decay as they are, epsilon / w
    parameters of blocks           epsilon * r besides: their gradients shrink with the branches
    the last layer                 epsilon as it is: its gradients do not shrink with the width

A model of the base's own size is the one without a base. The size of a head is meant to stay: width is added in heads.
Scalar gates, and scales of queries and keys, have gradients that shrink less than 1 / w: their epsilon is lower than it
need be.
"""

from typing import NamedTuple

from rdm_scale.config import ModelConfig

# Matrices whose inputs are as many at every width: the sizes of a patch, of an embedding, of a caption's tokens.
_FIXED_INPUTS = ("patch_embed", "class_embed", "timestep_embed.hidden", "text_embed.hidden", "branch.kv")


class Rates(NamedTuple):
    """Factors on the learning rate, the weight decay and Adam's epsilon of one parameter."""

    lr: float
    decay: float
    eps: float


def width_ratio(config: ModelConfig) -> float:
    """w: the width over that at which the rates were found."""
    return config.hidden_size / (config.base_width or config.hidden_size)


def depth_ratio(config: ModelConfig) -> float:
    """r: the residual branches of the model at which the rates were found, over those of this one."""
    return config.base_branches / config.branches


def inputs_grow(name: str) -> bool:
    """Whether the parameter of this logical name is a matrix whose inputs are more in a wider model."""
    return name.endswith(".weight") and not name.removesuffix(".weight").endswith(_FIXED_INPUTS)


def rates(name: str, w: float, r: float) -> Rates:
    """Of the parameter of this logical name in a model of these ratios; all 1 for a model without a base."""
    eps = (1 if name.startswith("head.out.") else 1 / w) * (r if name.startswith("blocks.") else 1)
    return Rates(1 / w, w, eps) if inputs_grow(name) else Rates(1, 1, eps)
