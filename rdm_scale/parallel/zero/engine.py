"""Data parallelism with DeepSpeed ZeRO: what all stages share.

Every rank keeps, of its part of the model, flat fp32 buffers: master weights, optimizer state and EMA weights.
`ZeroEngine.ranges` lists which ranges of which parameters they hold, so that nothing above this package needs to know
how DeepSpeed arranges its buffers.

    stage 3  parameters, gradients and optimizer state sharded; parameters all-gathered once a step
             (zero/stage3_gathered.py) or block by block (zero/stage3.py)
    stage 2  gradients and optimizer state sharded; gradients are reduced after every backward (zero/stages012.py)
    stage 1  optimizer state sharded; gradients are reduced once a step
    stage 0  nothing sharded
"""

import contextlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rdm_scale.batch import ModelInputs
from rdm_scale.config import RunConfig
from rdm_scale.dtypes import PRECISIONS
from rdm_scale.models.layers import Slice, parameter_slices
from rdm_scale.parallel.megatron_adapter import ModelParallelUnit
from rdm_scale.parallel.mesh import Mesh
from rdm_scale.parallel.pipeline.boundary import StageInputs, StageOutputs
from rdm_scale.parallel.plan import ParallelPlan
from rdm_scale.parallel.stage import Stage
from rdm_scale.parallel.zero import deepspeed_adapter as deepspeed


class ParameterRange(NamedTuple):
    """Range of one parameter in a rank's flat buffers."""

    name: str
    shape: tuple[int, ...]  # of the parameter
    first: int  # element of the flattened parameter where the range begins
    numel: int  # of the range
    start: int  # element of the flat buffers where the range lies
    part: Slice  # of the logical tensor that the parameter holds


class OptimizerState(NamedTuple):
    """State of AdamW, as flat buffers."""

    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]


class ZeroEngine(ABC):
    """A rank's part of the model, with gradients and optimizer state spread over the data-parallel ranks.

    Calling it runs the forward of one of the stage's chunks. All methods are collective over the data-parallel group.

    Attributes:
        master_weights: this rank's flat fp32 buffers.
        ranges: what those buffers, and those of the optimizer state, hold.
        owned_ranges: the ranges that this rank and no other writes into a checkpoint.
        blocks: the stage's blocks by number.

    Args:
        stage: this rank's pipeline stage, on the meta device.
        materialized: yields the children of the stage one after the other, each with its values.
        build_optimizer: makes the optimizer of the stage's parameters.
        leaf_type: type of the modules whose parameters are all-gathered together.
    """

    optimizer: deepspeed.ZeroOptimizer

    def __init__(
        self,
        stage: Stage,
        materialized: Iterable[nn.Module],
        config: RunConfig,
        mesh: Mesh,
        plan: ParallelPlan,
        build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        leaf_type: type[nn.Module],
    ) -> None:
        self.config, self.mesh, self.stage, self.zero_stage = config, mesh, stage, config.parallel.zero_stage
        self.blocks = {int(name): block for name, block in stage.get_submodule("blocks").named_children()}
        self.parameters: list[nn.Parameter] = []
        leaves = [module for module in stage.modules() if isinstance(module, leaf_type)]
        largest = max(sum(parameter.numel() for parameter in leaf.parameters()) for leaf in leaves)
        settings = deepspeed.settings(config, self._zero_settings(largest))
        for child in materialized:
            child.to(PRECISIONS[config.train.precision].torch)
            self._register(child, settings)
        self.slices = parameter_slices(stage)
        optimizer = build_optimizer(stage)
        self.optimizer = self._make_optimizer(stage, optimizer, settings, self._model_parallel_unit(), leaf_type)
        self.master_weights: list[Tensor] = [flat.detach() for flat in self.optimizer.master_parameters]
        self.ranges = list(self._ranges({id(parameter): name for name, parameter in stage.named_parameters()}))
        self.owned_ranges = [held for held in self.ranges if self._owns(held)]

    def __call__(self, chunk: int, model_inputs: ModelInputs, inputs: StageInputs) -> StageOutputs:
        outputs: StageOutputs = self.optimizer.engine(chunk, model_inputs, inputs)
        return outputs

    @abstractmethod
    def accumulating(self) -> contextlib.AbstractContextManager[None]:
        """Context of all forwards and backwards of one step; on leaving, gradients are reduced to their mean."""

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], last: bool = True) -> None:
        """Accumulate gradients; `step` uses their mean over the data-parallel ranks.

        Args:
            last: whether it is the last backward of a chunk in this step.
        """
        self.optimizer.begin_backward()
        torch.autograd.backward(outputs, gradients)

    def step(self, lr: float) -> Tensor:
        """Clip the gradients, update the weights and return the global gradient norm [] before clipping, in float64.

        Each parameter group has learning rate `lr` times its own factor. If a gradient is not finite nothing is
        updated, and the norm is not finite either.
        """
        self._set_learning_rate(lr)
        return torch.tensor(self.optimizer.step(), dtype=torch.float64, device=self.mesh.device)

    def optimizer_state(self) -> OptimizerState:
        """State of AdamW as flat buffers, laid out as the master weights; exists after the first step."""
        states = [self.optimizer.torch_optimizer.state[flat] for flat in self.optimizer.master_parameters]
        return OptimizerState([state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states])

    def reset_optimizer_state(self, step: int) -> None:
        """Make an optimizer state of zeros, to be filled by the caller, that counts `step` steps."""
        for flat in self.optimizer.master_parameters:
            self.optimizer.torch_optimizer.state[flat] = {
                "step": torch.tensor(float(step), device=flat.device),
                "exp_avg": torch.zeros_like(flat.detach()),
                "exp_avg_sq": torch.zeros_like(flat.detach()),
            }
        if not isinstance(self.optimizer.torch_optimizer, torch.optim.AdamW):
            for group in self.optimizer.torch_optimizer.param_groups:
                group["step"] = step  # apex counts here, and from 1 where it finds nothing

    def publish_master_weights(self) -> None:
        """Make the next forward compute with the master weights as they are now."""
        self.optimizer.publish_master_weights()

    @contextlib.contextmanager
    def swapped_weights(self, weights: list[Tensor]) -> Iterator[None]:
        """Context in which the model computes with other weights, given as flat buffers."""
        kept = [master.clone() for master in self.master_weights]
        self._copy_to_master_weights(weights)
        try:
            yield
        finally:
            self._copy_to_master_weights(kept)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Context without gradients or dropout."""
        self.optimizer.engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.optimizer.engine.train()

    @contextlib.contextmanager
    def recording_gradients(self) -> Iterator[dict[int, Tensor]]:
        """Context in which `step` records squared gradient norms by block.

        Yields:
            By block number, the sum of the squares (float64) of the gradient's elements in this rank's owned ranges,
            after clipping. Filled by the `step` within.
        """
        squares: dict[int, Tensor] = {}
        recorded: set[int] = set()  # flat buffers, by where they start: stage 3 may step them one by one

        def record(*_: Any) -> None:
            for start, flat in zip(starts_of(self.master_weights), self.optimizer.master_parameters, strict=True):
                if flat.grad is not None and start not in recorded:
                    recorded.add(start)
                    self._add_squares(squares, flat.grad.detach().flatten(), start)

        hook = self.optimizer.torch_optimizer.register_step_pre_hook(record)
        try:
            yield squares
        finally:
            hook.remove()

    def parameter_tensors(self) -> list[Tensor]:
        """Parameters as forwards use them and, with stage 3, this rank's shards of them; for measurements."""
        return self.optimizer.parameter_tensors(self.parameters)

    def gradient_tensors(self) -> list[Tensor]:
        """Gradients and the buffers that they are reduced to; for measurements."""
        return self.optimizer.gradient_tensors(self.parameters)

    def _set_learning_rate(self, lr: float) -> None:
        for group in self.optimizer.torch_optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def _register(self, child: nn.Module, settings: dict[str, Any]) -> None:
        """Register the parameters of a child of the stage after materialization."""
        slices = parameter_slices(child)
        for name, parameter in child.named_parameters():
            # A parameter that the tensor-parallel ranks share counts on one of them.
            deepspeed.count_in_norm(parameter, slices[name].count > 1 or self.mesh.tensor_rank == 0)
            self.parameters.append(parameter)

    def _owns(self, held: ParameterRange) -> bool:
        return held.numel > 0 and self.mesh.copies.rank == 0 and (held.part.count > 1 or self.mesh.tensor_rank == 0)

    def _add_squares(self, squares: dict[int, Tensor], gradient: Tensor, start: int) -> None:
        for owned in self.owned_ranges:
            first = owned.start - start
            if 0 <= first < gradient.numel() and owned.name.startswith("blocks."):
                norm = torch.linalg.vector_norm(gradient[first : first + owned.numel], dtype=torch.float32)
                block = int(owned.name.split(".")[1])
                squares[block] = squares.get(block, 0) + norm.double().square()

    @torch.no_grad()
    def _copy_to_master_weights(self, weights: list[Tensor]) -> None:
        torch._foreach_copy_(self.master_weights, weights)
        self.publish_master_weights()

    def _model_parallel_unit(self) -> type[ModelParallelUnit]:
        """Process groups as DeepSpeed asks for them (`mpu`): its data-parallel ranks are those that shard."""
        values = {"group": self.mesh.shard.group, "rank": self.mesh.shard.rank, "world_size": self.mesh.shard.size}
        members = {f"get_data_parallel_{what}": staticmethod(lambda v=value: v) for what, value in values.items()}
        return type("ShardUnit", (ModelParallelUnit,), members)

    @abstractmethod
    def _zero_settings(self, largest: int) -> dict[str, Any]:
        """DeepSpeed's zero_optimization; `largest` is the number of parameters of the largest leaf."""

    @abstractmethod
    def _make_optimizer(
        self,
        stage: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: dict[str, Any],
        unit: type[ModelParallelUnit],
        leaf_type: type[nn.Module],
    ) -> deepspeed.ZeroOptimizer:
        """DeepSpeed's optimizer of this ZeRO stage."""

    @abstractmethod
    def _ranges(self, names: dict[int, str]) -> Iterator[ParameterRange]:
        """List what the flat buffers hold; `names` are those of the parameters, by id."""


def starts_of(flats: list[Tensor]) -> list[int]:
    """Element at which each flat buffer begins in their concatenation."""
    return list(itertools.accumulate((flat.numel() for flat in flats[:-1]), initial=0))
