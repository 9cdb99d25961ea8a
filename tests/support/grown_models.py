"""Small models, and the same models grown in depth."""

from collections.abc import Callable

import torch
from torch import Tensor

from rdm_scale.config import GateConfig, InputConfig, ModelConfig
from rdm_scale.models import DiffusionTransformer, build_model
from rdm_scale.models.depth_growth import DepthGrowth

CAN_GROW = {
    "rezero": {"residual": "rezero"},
    "layerscale": {"residual": "layerscale"},
    "adaln_zero": {"residual": "adaln_zero"},
    "neural_rdm": {},
    "neural_rdm, unconditional": {"gate": GateConfig(conditional=False)},
    "adaln_zero, base of two blocks": {"residual": "adaln_zero", "base_depth": 2},
    "neural_rdm, base of three blocks": {"base_depth": 3},
    "neural_rdm, scalar gates, p = 1": {"gate": GateConfig(per_channel=False, exponent=1.0, multiplier=3.0)},
}


def model_config(depth: int, **changes: object) -> ModelConfig:
    base = {"input": InputConfig(height=8, width=8), "hidden_size": 32, "num_heads": 4, "num_classes": 10}
    return ModelConfig(**{**base, "depth": depth, **changes})


def map_grown(
    growth: DepthGrowth,
    grown: Callable[[str, Tensor], Tensor],
    initial: Callable[[str, torch.Size], Tensor],
    values: dict[str, Tensor],
) -> dict[str, Tensor]:
    """One tensor for each parameter of the grown model.

    Args:
        growth: mapping of the parameters.
        grown: makes a tensor from that of its source.
        initial: makes a tensor that has no source.
        values: tensors of the shallow model's parameters, by name.
    """
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in build_model(growth.new).named_parameters()}
    sources = {name: growth.source(name) for name in shapes}
    return {
        name: initial(name, shapes[name]) if source is None else grown(name, values[source].clone())
        for name, source in sources.items()
    }


def grown_weights(growth: DepthGrowth, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return map_grown(growth, growth.grown_value, lambda name, shape: growth.initial_value(name, shape, 0), weights)


def deeper(growth: DepthGrowth, model: DiffusionTransformer) -> DiffusionTransformer:
    """The grown model."""
    grown = build_model(growth.new, seed=7)
    grown.load_state_dict(grown_weights(growth, dict(model.named_parameters())))
    return grown


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and labels of four samples."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(4, 4, 1, 8, 8, generator=generator), torch.tensor([1.0, 200, 700, 990]), torch.arange(4)
