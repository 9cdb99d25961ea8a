"""Adapter of megatron-core (tested with 0.16.1): its process groups, and its tensor-parallel layers.

The layers hold the sharded weights; the operators of parallel/tensor_operators.py compute, as megatron-core would, but
so that torch.compile takes them.
"""

import inspect
import warnings
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rdm_scale.models.layers import Slice

# Warned about at import, in four modules, for optimizers that are not used here.
warnings.filterwarnings("ignore", "Transformer Engine and Apex are not installed", UserWarning)

from megatron.core import ModelParallelConfig, parallel_state  # noqa: E402
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear  # noqa: E402

from rdm_scale.parallel import tensor_operators as operators  # noqa: E402

_TESTED = "rdm_scale is tested with megatron-core 0.16.1"
_GROUPS = ("tensor_model_parallel", "pipeline_model_parallel", "data_parallel")
_EXPECTED: dict[Any, tuple[str, ...]] = {
    ColumnParallelLinear.__init__: ("config", "init_method", "bias", "gather_output"),
    RowParallelLinear.__init__: ("config", "init_method", "bias", "input_is_parallel", "skip_bias_add"),
    parallel_state.initialize_model_parallel: (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "order",
        "distributed_timeout_minutes",
        "create_gloo_process_groups",
    ),
}
for _name in (f"get_{group}_{what}" for group in _GROUPS for what in ("group", "rank", "world_size")):
    if not hasattr(parallel_state, _name):
        raise ImportError(f"megatron-core lacks parallel_state.{_name}; {_TESTED}")
for _callable, _parameters in _EXPECTED.items():
    for _name in _parameters:
        if _name not in inspect.signature(_callable).parameters:
            raise ImportError(f"megatron-core's {_callable.__qualname__} takes no {_name}; {_TESTED}")


class ModelParallelUnit:
    """Process groups of parallel_state under the names of DeepSpeed's `mpu` protocol.

    DeepSpeed sums the squared gradient norm over the model-parallel group: all ranks that hold different parts of the
    model, along the tensor and along the pipeline axis.
    """

    get_model_parallel_group = staticmethod(parallel_state.get_model_parallel_group)
    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)


class AxisGroup(NamedTuple):
    """Process group of this rank along one axis of the mesh, and the rank's place in it."""

    group: dist.ProcessGroup
    rank: int
    size: int


class MeshGroups(NamedTuple):
    """Process groups that this rank belongs to."""

    tensor: AxisGroup
    pipeline: AxisGroup
    data: AxisGroup
    replica: dist.ProcessGroup  # ranks of one model replica


def initialize_axes(tensor: int, pipeline: int, timeout: timedelta) -> MeshGroups:
    """Make the process groups of a mesh: tensor-parallel ranks adjacent, then data, then pipeline."""
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            order="tp-cp-ep-dp-pp",
            distributed_timeout_minutes=timeout / timedelta(minutes=1),
            create_gloo_process_groups=False,  # one more for each group, which nothing here uses
        )
    tensor_axis, pipeline_axis, data_axis = (
        AxisGroup(*(getattr(parallel_state, f"get_{group}_{what}")() for what in ("group", "rank", "world_size")))
        for group in _GROUPS
    )
    return MeshGroups(tensor_axis, pipeline_axis, data_axis, parallel_state.get_model_parallel_group())


def destroy_axes() -> None:
    """Forget the process groups, so that another mesh can be built in the same process."""
    parallel_state.destroy_model_parallel()


class Column(ColumnParallelLinear):
    """Linear layer whose output features are sharded over the tensor-parallel ranks.

    Args:
        gather: all-gather the output features; the input is then unsharded, too.
        sequence: the input holds this rank's tokens only; those of all ranks are all-gathered first.
        slices: of its parameters, by name (see models.layers.parameter_slices).
    """

    def __init__(self, inputs: int, outputs: int, *, gather: bool, sequence: bool, slices: dict[str, Slice]) -> None:
        super().__init__(inputs, outputs, config=_config(sequence), init_method=_keep, bias=True, gather_output=gather)
        self.slices, self.gather, self.sequence = slices, gather, sequence
        self.ranks = tensor_parallel_ranks()

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = operators.column(input, self.weight, self.bias, *self.ranks, self.sequence)
        return operators.gather_last(output, *self.ranks) if self.gather else output


class Row(RowParallelLinear):
    """Linear layer whose input features are sharded over the tensor-parallel ranks; it leaves its bias to the caller.

    Args:
        sequence: the output holds this rank's tokens only.
        slices: of its parameters, by name.
    """

    def __init__(self, inputs: int, outputs: int, *, sequence: bool, slices: dict[str, Slice]) -> None:
        super().__init__(
            inputs,
            outputs,
            config=_config(sequence),
            init_method=_keep,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=True,
        )
        self.slices, self.sequence = slices, sequence
        self.ranks = tensor_parallel_ranks()

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = operators.row(input, self.weight, *self.ranks, self.sequence)
        return output


class TensorParallelRanks(NamedTuple):
    """Name of a process group and number of its ranks, by which operators know it."""

    group: str
    size: int


def tensor_parallel_ranks() -> TensorParallelRanks:
    """This rank's tensor-parallel group."""
    group = parallel_state.get_tensor_model_parallel_group()
    return TensorParallelRanks(group.group_name, group.size())


def _config(sequence: bool) -> ModelParallelConfig:
    return ModelParallelConfig(
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        sequence_parallel=sequence,
        params_dtype=torch.float32,
        use_cpu_initialization=True,  # on the default device, which may be the meta device
        perform_initialization=False,  # models.initialization does
        gradient_accumulation_fusion=False,  # ZeRO needs the gradients
    )


def _keep(weight: Tensor) -> Tensor:
    return weight
