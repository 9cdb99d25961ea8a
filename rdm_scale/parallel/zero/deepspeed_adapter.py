"""All that touches DeepSpeed (tested with 0.19.8): its settings, and its ZeRO optimizers behind what we use of them.

DeepSpeed keeps private most of what a layout with several axes needs. What is reached into is listed below and looked
for at import and at start-up, so that another version fails with one line and not with a wrong gradient.
"""

import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
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
        "independent_gradient_partition_epilogue",
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
    DeepSpeedZeRoOffload: ("_remove_module_hooks",),
}
_ATTRIBUTES: dict[type, tuple[str, ...]] = {
    DeepSpeedZeroOptimizer_Stage3: (
        "fp32_partitioned_groups_flat",
        "fp16_groups",
        "grad_position",
        "grad_partitions_flat_buffer",
        "micro_step_id",
        "parameter_offload",
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
# It looks through all parameters for each parameter, minutes for a thousand blocks; ours are in one group each.
deepspeed.DeepSpeedEngine._check_for_duplicates = lambda self, optimizer: None
# For stage 1 in bf16 it would take another optimizer, with other buffers, than for stage 2 and for fp32.
deepspeed.DeepSpeedEngine._do_optimizer_sanity_check = lambda self, optimizer: ZERO_OPTIMIZATION
# It calls what torch has renamed, in every collective; the pinned versions go together.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
# On CPUs DeepSpeed would spend a minute compiling an all-reduce for inference, which training never calls.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed_logger.setLevel(logging.ERROR)


def settings(config: RunConfig, zero: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration; `zero` is its zero_optimization."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # has to be there; nothing that we use reads it
        "gradient_accumulation_steps": 1,  # the loss is divided by the number of micro-batches before
        # Below stage 3 every step is where accumulation ends, whatever number of backwards came before.
        "managed_gradient_accumulation": zero["stage"] == 3,
        "gradient_clipping": config.optimizer.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.train.precision == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": 10**9,
    }


def shard(parameters: Sequence[Any], sharded: Sequence[Any], group: Any, configuration: dict[str, Any]) -> None:
    """Leaves of each parameter only this rank's share; `sharded` are those for which that has been done before."""
    if sharded:
        sharded[0].convert_to_zero_parameters(param_list=list(parameters))
    else:
        holder = nn.ParameterList(parameters)
        deepspeed.zero.Init(module=holder, data_parallel_group=group, config_dict_or_path=configuration)


class Optimizer:
    """DeepSpeed's engine and ZeRO optimizer around a module and a plain optimizer.

    `masters` are the flat fp32 weights of this rank that the plain optimizer steps.
    """

    def __init__(
        self,
        module: nn.Module,
        plain: torch.optim.Optimizer,
        configuration: dict[str, Any],
        unit: Any,
        leaves: Sequence[type[nn.Module]],
    ) -> None:
        """`unit` says who is who (DeepSpeed's `mpu`); modules of the types `leaves` are gathered in one piece."""
        set_z3_leaf_modules(module, list(leaves))
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=plain, config=configuration, mpu=unit, dist_init_required=False
        )
        self.raw: Any = self.engine.optimizer
        for name in _ATTRIBUTES[type(self.raw)]:
            if not hasattr(self.raw, name):
                raise ImportError(
                    f"deepspeed {deepspeed.__version__}: {type(self.raw).__name__} lacks {name}; {_TESTED}"
                )
        self.plain: torch.optim.Optimizer = self.raw.optimizer
        self.masters: list[Tensor] = []

    def parameter_tensors(self, parameters: Sequence[Any]) -> list[Tensor]:
        """Parameters as forwards use them and, with stage 3, this rank's shards of them."""
        return [*parameters, *(p.ds_tensor for p in parameters if hasattr(p, "ds_tensor"))]

    def gradient_tensors(self, parameters: Sequence[Any]) -> list[Tensor]:
        """Gradients of parameters, accumulated and reduced ones: buffers differ from stage to stage."""
        found = [getattr(p, name, None) for p in parameters for name in ("grad", "grad_accum")]
        found.append(getattr(self.raw, "grad_partitions_flat_buffer", None))
        for name in ("averaged_gradients", "all_grad_tensors"):
            buffers = getattr(self.raw, name, None)
            found += [t for group in buffers.values() for t in group or ()] if isinstance(buffers, dict) else []
        return [tensor for tensor in found if tensor is not None]

    def begin_backward(self) -> None:
        self.raw.clear_backward_seen_flag()  # which DeepSpeed does in forwards only: the next backward would be lost

    def step(self) -> float:
        """The global gradient norm before clipping; inf, and nothing done, for gradients that are not finite."""
        self.engine.step()
        return float("inf") if self.raw.overflow else float(self.raw._global_grad_norm)

    def _norm_of_all_parts(self, norm_of_groups: Callable[[], Tensor]) -> Tensor:
        """The gradient norm over the model-parallel group, `norm_of_groups` being DeepSpeed's for this rank's groups.

        DeepSpeed would sum every parameter group on its own over the model-parallel ranks, and wait for ever where
        pipeline stages have groups of different kinds.
        """
        sum_over_parts = self.raw._model_parallel_all_reduce
        self.raw._model_parallel_all_reduce = lambda tensor, op: None
        try:
            square = norm_of_groups().square()
        finally:
            self.raw._model_parallel_all_reduce = sum_over_parts
        sum_over_parts(tensor=square, op=dist.ReduceOp.SUM)
        return square.sqrt()


class Stage3Optimizer(Optimizer):
    """Parameters, gradients and optimizer states sharded. `gradients` is this rank's share of all gradients, from which
    it steps, and `parameters` the order in which that holds the shares of parameters."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.masters = list(self.raw.fp32_partitioned_groups_flat)
        self.parameters: list[Any] = [p for group in self.raw.fp16_groups for p in group]
        self.gradients: Tensor = self.raw.grad_partitions_flat_buffer
        # DeepSpeed would flatten this flat buffer's pieces into another one in every step.
        parts = self.gradients.split([master.numel() for master in self.masters])

        def hand_over(group: int) -> None:
            self.masters[group].grad = parts[group]

        self.raw._prepare_fp32_grad_for_sub_group = hand_over
        norms = self.raw._get_norm_groups
        self.raw._get_norm_groups = lambda: [self._norm_of_all_parts(lambda: combine_grad_norm_groups(norms()))]

    def remove_hooks(self) -> None:
        """From here on modules neither gather nor release parameters, nor do backwards reduce gradients."""
        self.raw.parameter_offload._remove_module_hooks()
        for hook in (*self.raw._grad_acc_hooks, *self.raw._leaf_module_hooks):
            hook.remove()

    def gather(self) -> None:
        """Makes all parameters whole, in one all-gather."""
        missing = [p for p in self.parameters if p.ds_status.name == "NOT_AVAILABLE"]
        if missing:
            missing[0].all_gather_coalesced(missing).wait()

    def release(self) -> None:
        """Drops whole parameters; the shares stay."""
        gathered = [p for p in self.parameters if p.ds_status.name == "AVAILABLE"]
        if gathered:
            gathered[0].partition(gathered)

    def begin_step_of_hooks(self) -> None:
        """Where hooks reduce. DeepSpeed counts backwards an engine, and overwrites what the step before has left in the
        first of them: with several chunks an engine a second chunk's gradients would add to those of the last step."""
        self.gradients.zero_()
        self.raw.micro_step_id = 1

    def end_step_of_ours(self) -> None:
        """Where hooks do not: tells that `gradients` holds the means of this step."""
        self.raw.independent_gradient_partition_epilogue()

    def share_of(self, parameter: Any) -> tuple[int, int, int]:
        """(group of masters, offset in it, elements) of every rank's share of a parameter."""
        group, offset, size = self.raw.grad_position[self.raw.get_param_id(parameter)]
        return group, int(offset), size

    def publish_masters(self) -> None:
        """Makes the next forward compute with the masters as they are now."""
        self.raw._partition_all_parameters()  # what a forward left gathered, or fetched ahead, is out of date
        for group in range(len(self.masters)):
            self.raw._reassign_or_swap_out_partitioned_parameters(group)


class Stage12Optimizer(Optimizer):
    """Optimizer states, with stage 2 also gradients, sharded; parameters are slices of whole flat buffers. `groups` has
    the parameters and the elements of a rank's share of each of these buffers."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.masters = list(self.raw.single_partition_of_fp32_groups)
        self.groups: list[tuple[list[Any], int]] = list(
            zip(self.raw.bit16_groups, self.raw.partition_size, strict=True)
        )
        norm = self.raw.scaled_global_norm
        self.raw.scaled_global_norm = lambda: self._norm_of_all_parts(norm)

    def gradients_of(self, parameters: Iterable[Any]) -> list[Tensor]:
        """What the backwards of this step have added up, before it is reduced."""
        return [self.raw.get_gradient_for_reduction(parameter) for parameter in parameters]

    def drop_gradients(self) -> None:
        self.raw.zero_grad(set_to_none=True)

    def publish_masters(self) -> None:
        """Makes the next forward compute with the masters as they are now."""
        self.raw.update_lp_params()
