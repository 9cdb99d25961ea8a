"""Initial values of all parameters.

Weights start as in DiT (Xavier-uniform; embeddings normal with standard deviation 0.02; biases zero, scales of norms
one; the modulation and the last layer zero, so that the network initially ignores the condition and predicts zero) and
do not depend on depth. Depth enters through the gates alone (models/gates.py): with m = m0 * L^-1/2 and a = 1 the L
branches add m0^2 * mean(Var F) to the variance of the hidden states for any L, or less beyond a base depth. A branch
reads normalized hidden states, so Var F is a constant of the initialization: at most 0.5 for attention and about 0.2
for the MLP, against a variance of 0.5 of the position table alone. Hence the variance from first to last block, and
likewise the gain of a cotangent pulled back through the blocks, stay within a factor of 2 at every depth
(tests/models/test_initialization.py).

With a base width (models/parameterization.py) the embeddings' contribution to a channel does not depend on the width:
weights on patches and captions, whose sizes do not grow, are drawn as at that width, and the second layers of the
condition's embeddings, whose inputs do, smaller by the root of the ratio.

Every tensor is drawn by a generator keyed by its name: neither the order of construction, nor the number of ranks
that share a tensor, nor the presence of other parameters can change a value.
"""

import math

import torch
from torch import Tensor, nn

from rdm_scale import rng
from rdm_scale.config import ModelConfig
from rdm_scale.models.gates import ResidualGate
from rdm_scale.models.layers import parameter_slices
from rdm_scale.models.parameterization import inputs_grow, width_ratio


def initial_value(name: str, shape: torch.Size, seed: int, config: ModelConfig) -> Tensor:
    """Initial value of the parameter with this logical name and unsharded shape, fp32 on the CPU; gates excepted."""
    if name.endswith("bias") or "modulation." in name or name.startswith("head."):
        return torch.zeros(shape)
    if name.endswith("_scale"):
        return torch.ones(shape)
    generator, w = rng.generator(seed, "init", name), width_ratio(config)
    if name.startswith(("timestep_embed.", "class_embed.", "text_embed.")):
        return torch.randn(shape, generator=generator) * (0.02 / math.sqrt(w) if inputs_grow(name) else 0.02)
    bound = math.sqrt(6 / (shape[1] + (shape[0] if inputs_grow(name) else shape[0] / w)))
    return torch.rand(shape, generator=generator) * (2 * bound) - bound


@torch.no_grad()
def initialize(model: nn.Module, seed: int, config: ModelConfig, prefix: str = "") -> None:
    """Fill every parameter of a model, or of its submodule of name `prefix`; all must have storage."""
    gates = {prefix + name: module for name, module in model.named_modules() if isinstance(module, ResidualGate)}
    slices = parameter_slices(model)
    for local_name, parameter in model.named_parameters():
        name = prefix + local_name
        owner, _, leaf = name.rpartition(".")
        if owner in gates:
            parameter.fill_(gates[owner].start if leaf == "a" else 0.0)
        else:
            part = slices[local_name]
            shape = torch.Size(part.logical_shape(parameter.shape))
            parameter.copy_(part.of(initial_value(name, shape, seed, config)))
