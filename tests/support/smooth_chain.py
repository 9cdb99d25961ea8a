"""Residual chain whose weights are smooth functions of depth, and the flow that it discretizes."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call

from rdm_scale.config import ModelConfig
from rdm_scale.models.blocks import Conditioning, Mlp, Modulation, ResidualBranch
from rdm_scale.models.gates import ResidualGate
from rdm_scale.models.layers import LayerFactory

WIDTH, TOKENS = 12, 3


class SmoothChain:
    """Gated MLP branches (neural_rdm, m = 1/L) in float64; parameters p(s) = A + B sin(2 pi s) + C s at s = i/L."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.config = ModelConfig.model_validate(
            {
                "hidden_size": WIDTH, "num_heads": 2, "depth": 1, "residual": "neural_rdm", "mlp_ratio": 2,
                "gate": {"multiplier": 1.0, "exponent": 1.0, "conditional": False},
            }
        )  # fmt: skip
        self.branch = ResidualBranch(Mlp(self.config, LayerFactory()), ResidualGate(self.config)).double()
        self._waves = {
            name: [torch.randn(p.shape, generator=generator, dtype=torch.float64) * size for size in (0.5, 0.3, 0.3)]
            for name, p in self.branch.named_parameters()
        }
        self._shift, self._scale = torch.randn(2, WIDTH, generator=generator, dtype=torch.float64).unbind()
        self.start = torch.randn(TOKENS, 1, WIDTH, generator=generator, dtype=torch.float64)
        self.goal = torch.randn(TOKENS, 1, WIDTH, generator=generator, dtype=torch.float64)

    def steps(self, length: int) -> list[Callable[[Tensor], Tensor]]:
        """The residual branches of a chain of `length`."""
        return [lambda z, s=i / length: self._step(s, z, 1 / length) for i in range(length)]

    def velocity(self, s: float, z: Tensor) -> Tensor:
        """Velocity dz/ds = a(s) F(z; s) + b(s): the update of a branch with m = 1."""
        return self._step(s, z, 1.0) - z

    def loss(self, z: Tensor) -> Tensor:
        return (z - self.goal).square().sum()

    def _step(self, s: float, z: Tensor, multiplier: float) -> Tensor:
        self.branch.gate.multiplier = multiplier
        values = {
            name: base + wave * math.sin(2 * math.pi * s) + slope * s
            for name, (base, wave, slope) in self._waves.items()
        }
        gate = {name.removeprefix("gate."): value for name, value in values.items() if name.startswith("gate.")}
        alpha, beta = functional_call(self.branch.gate, gate, (None, values["branch.down.bias"], z.dtype))
        conditioning = Conditioning(self._shift, (1, 1, 1))  # the MLP uses neither
        return functional_call(
            self.branch, values, (z, conditioning, Modulation(self._shift, self._scale, beta, alpha))
        )
