"""Depth probe: statistics of each block in a training step, measured during the step without extra computation.

    stream        root mean square of the residual stream after a block
    sensitivity   norm of the gradient of the global batch's mean loss with respect to it
    gradient      norm of the gradient of a block's parameters, before clipping
    BRANCH.gain   ||alpha F + beta|| / ||z|| of a residual branch: its relative change of the residual stream
    BRANCH.alpha  mean of the gate over channels and samples, and BRANCH.alpha_std, its standard deviation
    BRANCH.beta   root mean square of the additive gate

All are of the global batch and the entire model, on every layout: sums of squares are summed over the ranks; those of a
tensor-parallel group see the same stream, or with sequence parallelism each its own tokens. Hooks on blocks run once
under activation checkpointing; hooks inside them may run twice, and measure ratios only.

Shapes: S tokens, B samples, D hidden size.
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rdm_scale.config import RunConfig
from rdm_scale.models.blocks import ResidualBranch
from rdm_scale.models.gates import ResidualGate
from rdm_scale.parallel.parallel_model import ParallelModel
from rdm_scale.training.depth_profiles import Profile


class DepthProbe:
    """Measures this rank's blocks in the steps in which it is asked to."""

    def __init__(self, config: RunConfig, model: ParallelModel) -> None:
        self.config, self.model, self.mesh = config, model, model.mesh
        self._sums: dict[str, Tensor] = {}  # [depth] each

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Context around the forwards, the backwards and the update of the step to measure."""
        self._sums = {}
        hooks = [hook for number, block in self.model.blocks.items() for hook in self._watch(number, block)]
        try:
            with self.model.running_eagerly(), self.model.recording_gradients() as squares:
                yield
        finally:
            for hook in hooks:
                hook.remove()
        for block, square in squares.items():
            self._add("gradient", block, square)

    def profile(self, grad_norm: float) -> Profile:
        """Profile of the step that was measured, whose gradient norm before clipping is given. Collective."""
        sums = self._all_reduced_sums()
        clipped = self.model.clip_factor(grad_norm)
        found: Profile = {
            "stream": _ratio(sums, "stream", "stream.n", math.sqrt),
            "sensitivity": [math.sqrt(square) for square in sums["sensitivity"]],
            "gradient": [math.sqrt(square) * clipped for square in sums["gradient"]],
        }
        for branch in sorted({key.rpartition(".")[0] for key in sums if key.endswith(".change")}):
            found[f"{branch}.gain"] = _ratio(sums, f"{branch}.change", f"{branch}.read", math.sqrt)
            mean = _ratio(sums, f"{branch}.alpha", f"{branch}.alpha.n")
            square = _ratio(sums, f"{branch}.alpha2", f"{branch}.alpha.n")
            found[f"{branch}.alpha"] = mean
            found[f"{branch}.alpha_std"] = [
                None if m is None or s is None else math.sqrt(max(s - m * m, 0.0))
                for m, s in zip(mean, square, strict=True)
            ]
            if any(sums.get(f"{branch}.beta.n", [])):
                found[f"{branch}.beta"] = _ratio(sums, f"{branch}.beta2", f"{branch}.beta.n", math.sqrt)
        return found

    def _watch(self, block: int, module: nn.Module) -> Iterator[RemovableHandle]:
        yield module.register_forward_hook(lambda _, inputs, z_SBD: self._record_stream(block, z_SBD))
        for name, branch in module.named_children():
            if isinstance(branch, ResidualBranch):
                yield branch.register_forward_hook(
                    lambda _, inputs, z_SBD, name=name: self._record_branch(block, name, inputs[0], z_SBD)
                )
                yield branch.gate.register_forward_hook(
                    lambda gate, _, outputs, name=name: self._record_gate(block, name, gate, outputs[0])
                )

    def _record_stream(self, block: int, z_SBD: Tensor) -> None:
        self._add("stream", block, _square(z_SBD))
        self._add("stream.n", block, z_SBD.numel())
        if z_SBD.requires_grad:
            copies = 1 if self.config.parallel.sequence else self.mesh.tensor_size
            scale = 1 / copies / self.mesh.data_size**2  # a rank's backwards are of its own samples' mean
            z_SBD.register_hook(lambda gradient: self._add("sensitivity", block, _square(gradient) * scale))

    def _record_branch(self, block: int, branch: str, z_SBD: Tensor, changed_SBD: Tensor) -> None:
        self._add(f"{branch}.read", block, _square(z_SBD))
        self._add(f"{branch}.change", block, _square(changed_SBD.detach() - z_SBD.detach()))

    def _record_gate(self, block: int, branch: str, gate: ResidualGate, alpha: Tensor | None) -> None:
        alpha = torch.ones(1) if alpha is None else alpha.detach().double()
        self._add(f"{branch}.alpha", block, alpha.sum())
        self._add(f"{branch}.alpha2", block, alpha.square().sum())
        self._add(f"{branch}.alpha.n", block, alpha.numel())
        if gate.b is not None:
            self._add(f"{branch}.beta2", block, _square(gate.b) * gate.multiplier**2)
            self._add(f"{branch}.beta.n", block, gate.b.numel())

    def _add(self, quantity: str, block: int, value: Tensor | float) -> None:
        if quantity not in self._sums:
            self._sums[quantity] = torch.zeros(self.config.model.depth, dtype=torch.float64, device=self.mesh.device)
        self._sums[quantity][block] += value

    def _all_reduced_sums(self) -> dict[str, list[float]]:
        """Sums over all ranks, each of which holds some of the blocks."""
        names = sorted({name for names in self.mesh.all_gather_object(list(self._sums)) for name in names})
        depth = self.config.model.depth
        own = [self._sums[name] if name in self._sums else torch.zeros(depth) for name in names]
        total = self.mesh.all_reduce_sum(torch.cat([values.double().cpu() for values in own]).tolist())
        return {name: total[i * depth : (i + 1) * depth] for i, name in enumerate(names)}


def _square(tensor: Tensor) -> Tensor:
    """Sum of the squares, without a copy of the tensor."""
    return torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32).double().square()


def _ratio(
    sums: dict[str, list[float]], numerator: str, denominator: str, transform: Callable[[float], float] = float
) -> list[float | None]:
    pairs = zip(sums[numerator], sums[denominator], strict=True)
    return [transform(above / below) if below else None for above, below in pairs]
