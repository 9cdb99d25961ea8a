"""Adapter of DeepSpeed (tested with 0.19.8): its settings, and its ZeRO optimizers behind a small interface.

Most of what a layout with several axes needs is private in DeepSpeed. Every private name that is used is listed below
and checked at import or at start-up, so that another version fails with one line and not with a wrong gradient.
"""

import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from rdm_scale.config import RunConfig

_TESTED = "rdm_scale is tested with deepspeed 0.19.8"
_METHODS: dict[type, tuple[str, ...]] = {
    deepspeed.DeepSpeedEngine: ("_check_for_duplicates", "_do_optimizer_sanity_check"),
    DeepSpeedZeroOptimizer_Stage3: (
        "clear_backward_seen_flag",
        "get_param_id",
        "_partition_all_parameters",
        "_get_norm_groups",
        "_model_parallel_all_reduce",
        "_prepare_fp32_grad_for_sub_group",
        "_reassign_or_swap_out_partitioned_parameters",
    ),
    DeepSpeedZeroOptimizer: (
        "clear_backward_seen_flag",
        "get_gradient_for_reduction",
        "scaled_global_norm",
        "update_lp_params",
        "_model_parallel_all_reduce",
    ),
}
_ATTRIBUTES: dict[type, tuple[str, ...]] = {
    DeepSpeedZeroOptimizer_Stage3: (
        "fp32_partitioned_groups_flat",
        "fp16_partitioned_groups_flat",
        "fp16_groups",
        "sub_group_to_group_id",
        "grad_position",
        "grad_partitions_flat_buffer",
        "micro_step_id",
        "_grad_acc_hooks",
        "_leaf_module_hooks",
    ),
    DeepSpeedZeroOptimizer: ("single_partition_of_fp32_groups", "bit16_groups", "partition_size"),
}
for _class, _names in _METHODS.items():
    for _name in _names:
        if not callable(getattr(_class, _name, None)):
            raise ImportError(f"deepspeed {deepspeed.__version__} lacks {_class.__name__}.{_name}; {_TESTED}")

if not hasattr(partitioned_param_coordinator, "assert_ints_same_as_other_ranks"):
    raise ImportError(f"deepspeed {deepspeed.__version__} no longer compares module orders; {_TESTED}")
# It compares numbers that count modules since the process began, over all ranks: they differ between pipeline stages,
# and between processes that have trained before.
partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda ints: None
# It searches all parameters for each parameter, minutes for a thousand blocks; here each is in one group by
# construction.
deepspeed.DeepSpeedEngine._check_for_duplicates = lambda self, optimizer: None
# For stage 1 in bf16 it would take another optimizer, with other buffers, than for stage 2 and for fp32.
deepspeed.DeepSpeedEngine._do_optimizer_sanity_check = lambda self, optimizer: ZERO_OPTIMIZATION
# It calls functions that torch has renamed, in every collective; the pinned versions work together.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
# On CPUs DeepSpeed would spend a minute compiling an all-reduce for inference, which training never calls.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed_logger.setLevel(logging.ERROR)


def settings(config: RunConfig, zero: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration; `zero` is its zero_optimization."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # required, but not read by anything that is used here
        "gradient_accumulation_steps": 1,  # the loss is divided by the number of micro-batches before
        # Below stage 3 every step is where accumulation ends, whatever number of backwards came before.
        "managed_gradient_accumulation": zero["stage"] == 3,
        "gradient_clipping": config.optimizer.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on CPUs, too
        "bf16": {"enabled": config.train.precision == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": config.parallel.reduce_dtype,
        "steps_per_print": 10**9,
    }


class ParameterShare(NamedTuple):
    """Share of a parameter that each data-parallel rank holds under stage 3."""

    group: int  # index of the flat buffer that holds the share
    offset: int  # in that buffer
    numel: int  # of every rank's share; the last ranks' are padded
    unsharded_shape: tuple[int, ...]
    unsharded_numel: int


class ParameterGroup(NamedTuple):
    """Parameters of one flat buffer under stages 1 and 2, and the elements of each rank's shard of it."""

    parameters: list[nn.Parameter]
    shard_numel: int


def shard(parameters: Sequence[Any], sharded: Sequence[Any], group: Any, configuration: dict[str, Any]) -> None:
    """Shard parameters in place over the ranks of `group`; `sharded` are those sharded before."""
    if sharded:
        sharded[0].convert_to_zero_parameters(param_list=list(parameters))
    else:
        holder = nn.ParameterList(parameters)
        deepspeed.zero.Init(module=holder, data_parallel_group=group, config_dict_or_path=configuration)


def count_in_norm(parameter: Any, counted: bool) -> None:
    """Declare whether a parameter's gradient counts in the gradient norm on this rank."""
    parameter.model_parallel = counted  # DeepSpeed looks for this attribute


class ZeroOptimizer:
    """DeepSpeed's engine and ZeRO optimizer around a module and a torch optimizer.

    Attributes:
        engine: called, runs the module's forward.
        torch_optimizer: steps the master parameters.
        master_parameters: flat fp32 weights of this rank.

    Args:
        unit: process groups (DeepSpeed's `mpu`).
        leaf_type: type of the modules whose parameters are all-gathered together; None: DeepSpeed gathers nothing.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        configuration: dict[str, Any],
        unit: Any,
        leaf_type: type[nn.Module] | None,
    ) -> None:
        if leaf_type is not None:
            set_z3_leaf_modules(module, [leaf_type])
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=configuration, mpu=unit, dist_init_required=False
        )
        self._zero: Any = self.engine.optimizer
        for name in _ATTRIBUTES[type(self._zero)]:
            if not hasattr(self._zero, name):
                raise ImportError(
                    f"deepspeed {deepspeed.__version__}: {type(self._zero).__name__} lacks {name}; {_TESTED}"
                )
        self.torch_optimizer: torch.optim.Optimizer = self._zero.optimizer
        self.master_parameters: list[Tensor] = []

    def begin_backward(self) -> None:
        """Prepare DeepSpeed for a backward, which it does in forwards only: a second backward would be ignored."""
        self._zero.clear_backward_seen_flag()

    def step(self) -> float:
        """Step, and return the global gradient norm before clipping; inf, without a step, if it is not finite."""
        self.engine.step()
        return float("inf") if self._zero.overflow else float(self._zero._global_grad_norm)

    def publish_master_weights(self) -> None:
        """Make the next forward compute with the master parameters as they are now."""
        raise NotImplementedError

    def parameter_tensors(self, parameters: Sequence[Any]) -> list[Tensor]:
        """Parameters as forwards use them and, with stage 3, this rank's shards of them."""
        return [*parameters, *(p.ds_tensor for p in parameters if hasattr(p, "ds_tensor"))]

    def gradient_tensors(self, parameters: Sequence[Any]) -> list[Tensor]:
        """Gradients of parameters, accumulated and reduced ones: buffers differ from stage to stage."""
        found = [getattr(p, name, None) for p in parameters for name in ("grad", "grad_accum")]
        found.append(getattr(self._zero, "grad_partitions_flat_buffer", None))
        for name in ("averaged_gradients", "all_grad_tensors"):
            buffers = getattr(self._zero, name, None)
            found += [t for group in buffers.values() for t in group or ()] if isinstance(buffers, dict) else []
        return [tensor for tensor in found if tensor is not None]

    def _norm_over_model_parallel_group(self, norm_of_groups: Callable[[], Tensor]) -> Tensor:
        """Gradient norm over the model-parallel group, `norm_of_groups` being DeepSpeed's for this rank's groups.

        DeepSpeed would all-reduce every parameter group on its own over the model-parallel ranks, and hang where
        pipeline stages have different parameter groups.
        """
        all_reduce = self._zero._model_parallel_all_reduce
        self._zero._model_parallel_all_reduce = lambda tensor, op: None
        try:
            square = norm_of_groups().square()
        finally:
            self._zero._model_parallel_all_reduce = all_reduce
        all_reduce(tensor=square, op=dist.ReduceOp.SUM)
        return square.sqrt()


class Stage3Optimizer(ZeroOptimizer):
    """DeepSpeed's optimizer of stage 3.

    Attributes:
        gradients: this rank's share of all gradients, from which it steps.
        parameters: in the order in which `gradients` holds their shares.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._gradient_counters: dict[nn.Module, int] = {}
        self.master_parameters = list(self._zero.fp32_partitioned_groups_flat)
        self.parameters: list[Any] = [p for group in self._zero.fp16_groups for p in group]
        self.gradients: Tensor = self._zero.grad_partitions_flat_buffer
        # DeepSpeed would flatten the parts of this flat buffer into another one in every step.
        parts = self.gradients.split([master.numel() for master in self.master_parameters])

        def use_gradients_in_place(group: int) -> None:
            self.master_parameters[group].grad = parts[group]

        self._zero._prepare_fp32_grad_for_sub_group = use_gradients_in_place
        norms = self._zero._get_norm_groups
        self._zero._get_norm_groups = lambda: [
            self._norm_over_model_parallel_group(lambda: combine_grad_norm_groups(norms()))
        ]

    def save_gradient_counters(self) -> None:
        """Save, after a forward, for each of its modules how many of its inputs require a gradient."""
        counts = ((module, getattr(module, "ds_grads_remaining", 0)) for module in self.engine.module.modules())
        self._gradient_counters |= {module: count for module, count in counts if count > 0}

    def restore_gradient_counters(self) -> None:
        """Restore the saved counters before a backward.

        DeepSpeed counts them down to release a module's parameters, and up in forwards only: without this a second
        backward after two forwards would keep all parameters of the stage gathered.
        """
        for module, count in self._gradient_counters.items():
            module.ds_grads_remaining = count  # type: ignore[assignment]

    def begin_step_with_hooks(self) -> None:
        """Reset the gradients of a step in which hooks reduce.

        DeepSpeed counts backwards of an engine, and overwrites the last step's gradients in the first of them: with
        several chunks an engine a second chunk's gradients would be added to those of the last step.
        """
        self.gradients.zero_()
        self._zero.micro_step_id = 1

    def share_of(self, parameter: Any) -> ParameterShare:
        """Share that each rank holds of a parameter."""
        group, offset, numel = self._zero.grad_position[self._zero.get_param_id(parameter)]
        return ParameterShare(group, int(offset), numel, tuple(parameter.ds_shape), parameter.ds_numel)

    def publish_master_weights(self) -> None:
        self._zero._partition_all_parameters()  # what a forward left gathered, or prefetched, is out of date
        for group in range(len(self.master_parameters)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)


class FlatOptimizer(ZeroOptimizer):
    """DeepSpeed's optimizer of stage 3 over a few flat parameters, for steps that run none of its hooks.

    DeepSpeed shards the flat parameters and makes the master parameters. It never sees the modules whose parameters
    they hold, so that it hooks none of them and replaces none of their parameter dictionaries.

    Attributes:
        flats: the flat parameters, in the order in which the buffers hold their shards.
        weights: this rank's shard of each of them.
        gradients: this rank's shard of the gradient of each of them, from which the optimizer steps.

    Args:
        flats_of_groups: unsharded flat parameters of each parameter group of `optimizer`, which lists them from now on.
        group: ranks to shard them over.
    """

    def __init__(
        self,
        flats_of_groups: Sequence[Sequence[nn.Parameter]],
        group: Any,
        optimizer: torch.optim.Optimizer,
        configuration: dict[str, Any],
        unit: Any,
    ) -> None:
        holder = nn.ParameterList(flat for flats in flats_of_groups for flat in flats)
        shard(list(holder), (), group, configuration)
        for settings_of_group, flats in zip(optimizer.param_groups, flats_of_groups, strict=True):
            settings_of_group["params"] = list(flats)
        super().__init__(holder, optimizer, configuration, unit, leaf_type=None)
        for hook in (*self._zero._grad_acc_hooks, *self._zero._leaf_module_hooks):
            hook.remove()
        self.flats: list[Any] = [flat for flats in self._zero.fp16_groups for flat in flats]
        self.weights: list[Tensor] = [flat.ds_tensor.data for flat in self.flats]
        buffer: Tensor = self._zero.grad_partitions_flat_buffer
        self.gradients: list[Tensor] = list(buffer.split([weights.numel() for weights in self.weights]))
        self._use_master_parameters(buffer)
        if hasattr(self.torch_optimizer, "grad_scale"):
            raise ImportError(f"torch {torch.__version__}: an optimizer has an attribute grad_scale before a step")

    def _use_master_parameters(self, gradients: Tensor) -> None:
        """Give the torch optimizer its parameters and gradients for good; DeepSpeed does for one step at a time."""
        self.master_parameters = list(self._zero.fp32_partitioned_groups_flat)
        self._weights_of_masters: list[Tensor] = list(self._zero.fp16_partitioned_groups_flat)
        parts = gradients.split([master.numel() for master in self.master_parameters])
        for number, (master, part) in enumerate(zip(self.master_parameters, parts, strict=True)):
            master.grad = part
            self.torch_optimizer.param_groups[self._zero.sub_group_to_group_id[number]]["params"].append(master)

    def step_divided(self, divisor: Tensor, finite: Tensor) -> bool:
        """Step with the gradients divided by `divisor`; do nothing where `finite` is not 1.

        Returns True if hooks of the optimizer's step see the gradients before they are divided.

        torch's fused optimizers take both as tensors, in the way of torch.amp.GradScaler: without another pass over
        the gradients, and without waiting for the device.
        """
        optimizer: Any = self.torch_optimizer
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            device = self.master_parameters[0].device  # with offloading the host: waits for the device
            optimizer.grad_scale, optimizer.found_inf = divisor.float().to(device), 1 - finite.float().to(device)
            optimizer.step()
            return True
        if finite.item():
            torch._foreach_div_(self.gradients, divisor.float())
            optimizer.step()
        return False

    def publish_master_weights(self) -> None:
        torch._foreach_copy_(self._weights_of_masters, [master.detach() for master in self.master_parameters])


class Stage12Optimizer(ZeroOptimizer):
    """DeepSpeed's optimizer of stages 1 and 2.

    Attributes:
        groups: the parameters of each flat buffer.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.master_parameters = list(self._zero.single_partition_of_fp32_groups)
        self.groups = [
            ParameterGroup(parameters, numel)
            for parameters, numel in zip(self._zero.bit16_groups, self._zero.partition_size, strict=True)
        ]
        norm = self._zero.scaled_global_norm
        self._zero.scaled_global_norm = lambda: self._norm_over_model_parallel_group(norm)

    def gradients_of(self, parameters: Iterable[Any]) -> list[Tensor]:
        """Gradients that the backwards of this step have accumulated, before reduction."""
        return [self._zero.get_gradient_for_reduction(parameter) for parameter in parameters]

    def drop_gradients(self) -> None:
        """Discard the accumulated gradients."""
        self._zero.zero_grad(set_to_none=True)

    def publish_master_weights(self) -> None:
        self._zero.update_lp_params()
