"""The data-parallel axis under DeepSpeed ZeRO, and all that touches DeepSpeed (tested with 0.19.8).

Every rank keeps, of its part of the model, flat fp32 buffers: the master weights, Adam's moments and whatever is
averaged from them. `ZeroEngine.shards` says which ranges of which parameters these are, so that nothing
above this module needs to know how DeepSpeed arranges its buffers.

    stage 3  parameters, gradients and optimizer states sharded; parameters are gathered a block at a time for every
             forward and backward, or once a step (`keep_gathered`)
    stage 2  gradients and optimizer states sharded; gradients are reduced after every backward
    stage 1  optimizer states sharded; gradients are reduced once a step
    stage 0  nothing sharded: stage 1 over a group of one rank, after gradients have been averaged over the data group
"""

import contextlib
import itertools
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from rdm_scale.config import RunConfig
from rdm_scale.models.layers import Slice, slice_of
from rdm_scale.parallel.megatron import ModelParallelUnit
from rdm_scale.parallel.mesh import Mesh

_TESTED = "rdm_scale is tested with deepspeed 0.19.8"
_METHODS: dict[type, tuple[str, ...]] = {
    deepspeed.DeepSpeedEngine: ("coalesce_grad_reduction", "_check_for_duplicates"),
    DeepSpeedZeroOptimizer_Stage3: (
        "clear_backward_seen_flag",
        "get_param_id",
        "_partition_all_parameters",
        "_reassign_or_swap_out_partitioned_parameters",
    ),
    DeepSpeedZeroOptimizer: ("clear_backward_seen_flag", "get_gradient_for_reduction", "update_lp_params"),
}
_ATTRIBUTES: dict[type, tuple[str, ...]] = {
    DeepSpeedZeroOptimizer_Stage3: (
        "fp32_partitioned_groups_flat",
        "fp16_groups",
        "grad_position",
        "grad_partitions_flat_buffer",
        "micro_step_id",
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
# It calls what torch has renamed, in every collective; the pinned versions go together.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
# On CPUs DeepSpeed would spend a minute compiling an all-reduce for inference, which training never calls.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

_KEPT_GATHERED = -1  # stands, among the modules that use a parameter, for the step that does


@dataclass(frozen=True)
class Shard:
    """A rank's range of one parameter: elements `first` to `first + count` of the flattened tensor of `shape`, found
    from element `start` of the rank's flat buffers. The parameter itself may be a `part` of its logical tensor."""

    name: str
    shape: tuple[int, ...]
    first: int
    count: int
    start: int
    part: Slice


class ZeroEngine(ABC):
    """A rank's part of the model, with its gradients and optimizer states spread over the data-parallel ranks.

    Calling it runs the module's forward. All of it is collective over the data-parallel group. `masters`, and the
    tensors of `moments`, are this rank's flat fp32 buffers, all of one layout; `writes` are the shards that this rank
    and no other puts into a checkpoint.
    """

    def __init__(
        self,
        module: nn.Module,
        real: Iterable[nn.Module],
        config: RunConfig,
        mesh: Mesh,
        build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        leaves: Sequence[type[nn.Module]],
    ) -> None:
        """`real` goes through the children of `module`, which is on the meta device, and makes one after the other
        real; the parameters of modules of the types `leaves` are gathered together."""
        deepspeed_logger.setLevel(logging.ERROR)
        self.mesh = mesh
        self.parameters: list[Any] = []
        largest = max(sum(p.numel() for p in m.parameters()) for m in module.modules() if isinstance(m, tuple(leaves)))
        settings = _settings(config, self._zero_settings(largest))
        for child in real:
            child.to(torch.bfloat16 if config.train.precision == "bf16" else torch.float32)
            self._take_in(list(child.parameters()), settings)
        set_z3_leaf_modules(module, list(leaves))
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(module),
            config=settings,
            mpu=self._model_parallel_unit(),
            dist_init_required=False,
        )
        self._zero: Any = self.engine.optimizer
        for name in _ATTRIBUTES[type(self._zero)]:
            if not hasattr(self._zero, name):
                raise ImportError(
                    f"deepspeed {deepspeed.__version__}: {type(self._zero).__name__} lacks {name}; {_TESTED}"
                )
        self.masters: list[Tensor] = [flat.detach() for flat in self._flats()]
        self.shards = list(self._shards({id(p): name for name, p in module.named_parameters()}))
        self.writes = [shard for shard in self.shards if self._writes(shard)]

    def __call__(self, *inputs: Any) -> Any:
        return self.engine(*inputs)

    @abstractmethod
    def accumulating(self) -> contextlib.AbstractContextManager[None]:
        """Around all forwards and backwards of one step; on leaving, the gradients have been averaged."""

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Adds to the gradients; the step uses their mean over the data-parallel ranks."""
        self._zero.clear_backward_seen_flag()  # which DeepSpeed does in forwards only: the next backward would be lost
        torch.autograd.backward(outputs, gradients)

    def step(self, lr: float) -> float:
        """Clips, updates the weights and returns the global gradient norm before clipping.

        With a gradient that is not finite nothing is updated, and the norm returned is inf.
        """
        for group in self._zero.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        return float("inf") if self._zero.overflow else float(self._zero._global_grad_norm)

    def moments(self, step: int | None = None) -> dict[str, list[Tensor]]:
        """Adam's first and second moments; with `step`, they are (re)made to be filled, as after so many steps."""
        optimizer, flats = self._zero.optimizer, self._flats()
        if step is not None:
            for flat in flats:
                optimizer.state[flat] = {
                    "step": torch.tensor(float(step), device=flat.device),
                    "exp_avg": torch.zeros_like(flat.detach()),
                    "exp_avg_sq": torch.zeros_like(flat.detach()),
                }
            for group in optimizer.param_groups:
                if "step" in group:  # apex counts here
                    group["step"] = step
        return {name: [optimizer.state[flat][name] for flat in flats] for name in ("exp_avg", "exp_avg_sq")}

    @torch.no_grad()
    def set_masters(self, flats: list[Tensor]) -> None:
        """Sets the weights: the masters, and what forward computes with."""
        for master, flat in zip(self.masters, flats, strict=True):
            if master is not flat:
                master.copy_(flat)
        self._publish_masters()

    @contextlib.contextmanager
    def holding(self, flats: list[Tensor]) -> Iterator[None]:
        """Within, the model computes with other weights (their averages) and without dropout or gradients."""
        kept = [master.clone() for master in self.masters]
        self.set_masters(flats)
        try:
            with self.evaluating():
                yield
        finally:
            self.set_masters(kept)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        self.engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.engine.train()

    def _take_in(self, parameters: list[Any], settings: dict[str, Any]) -> None:
        """Is given the parameters of each child that has become real."""
        for parameter in parameters:  # one that the tensor-parallel ranks share counts once in the norm
            parameter.model_parallel = slice_of(parameter).count > 1 or self.mesh.tensor_rank == 0
        self.parameters += parameters

    def _model_parallel_unit(self) -> Any:
        return ModelParallelUnit

    def _writes(self, shard: Shard) -> bool:
        return shard.count > 0 and (shard.part.count > 1 or self.mesh.tensor_rank == 0)

    @abstractmethod
    def _zero_settings(self, largest: int) -> dict[str, Any]:
        """DeepSpeed's zero_optimization; `largest` is the number of parameters of the largest leaf."""

    @abstractmethod
    def _flats(self) -> list[Tensor]:
        """The flat fp32 master weights that the optimizer steps."""

    @abstractmethod
    def _shards(self, names: dict[int, str]) -> Iterator[Shard]:
        """What the flat buffers hold, by parameter; `names` by id."""

    @abstractmethod
    def _publish_masters(self) -> None:
        """Makes the forward compute with the masters as they are now."""


class Zero3(ZeroEngine):
    """Stage 3. With `keep_gathered` all parameters of this rank are gathered once a step, and their gradients reduced
    once; without, a block's are gathered for each of its forwards and backwards and reduced after each backward."""

    def __init__(self, *arguments: Any, keep_gathered: bool, **more: Any) -> None:
        self.keep_gathered = keep_gathered
        self._inputs: dict[Any, int] = {}  # of each module: how many of its tensor inputs have a gradient
        super().__init__(*arguments, **more)

    def __call__(self, *inputs: Any) -> Any:
        outputs = super().__call__(*inputs)
        for module in () if self.keep_gathered else self.engine.module.modules():
            if getattr(module, "ds_grads_remaining", 0) > 0:
                self._inputs[module] = module.ds_grads_remaining
        return outputs

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        # DeepSpeed counts them down to release a module's parameters, and up in forwards only: without this a second
        # backward after two forwards would keep the whole stage gathered.
        for module, count in self._inputs.items():
            module.ds_grads_remaining = count
        super().backward(outputs, gradients)

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        if not self.keep_gathered:
            # DeepSpeed counts backwards an engine, and overwrites what the step before has left in the first of them.
            # With several chunks an engine that would add a second chunk's gradients to those of the last step.
            self._zero.grad_partitions_flat_buffer.zero_()
            self._zero.micro_step_id = 1
            yield
            return
        with self.engine.coalesce_grad_reduction():
            self._gather()
            try:
                yield
                self._reduce()
            finally:  # when a forward failed, too: DeepSpeed would reduce what there is, and wait for its peers
                for parameter in self.parameters:
                    parameter.grad = None
            self._release()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        with super().evaluating():
            if self.keep_gathered:
                self._gather()
            yield
            if self.keep_gathered:
                self._release()

    def _gather(self) -> None:
        missing: Any = [p for p in self.parameters if p.ds_status.name == "NOT_AVAILABLE"]
        if missing:
            missing[0].all_gather_coalesced(missing).wait()
        for parameter in self.parameters:
            parameter.ds_active_sub_modules.add(_KEPT_GATHERED)

    def _release(self) -> None:
        for parameter in self.parameters:
            parameter.ds_active_sub_modules.clear()
        gathered: Any = [p for p in self.parameters if p.ds_status.name == "AVAILABLE"]
        if gathered:
            gathered[0].partition(gathered)

    @torch.no_grad()
    def _reduce(self) -> None:
        """One reduce-scatter of all gradients, into the buffer from which DeepSpeed steps."""
        size, mine = self.mesh.data_size, self._zero.grad_partitions_flat_buffer
        whole = mine.new_zeros(size, mine.numel()) if size > 1 else mine.zero_().view(1, -1)
        start = 0
        for parameter in (p for group in self._zero.fp16_groups for p in group):
            count = parameter.partition_numel()
            if parameter.grad is not None:
                gradient = parameter.grad.flatten()
                if gradient.numel() == size * count:
                    whole[:, start : start + count] = gradient.view(size, count)
                else:
                    for rank, part in enumerate(gradient.split(count)):
                        whole[rank, start : start + part.numel()] = part
                parameter.grad = None
            start += count
        if size > 1:
            dist.reduce_scatter_tensor(mine, whole.flatten(), group=self.mesh.data_group)
            mine.div_(size)

    def _zero_settings(self, largest: int) -> dict[str, Any]:
        return {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            # Nothing is kept for its next use, however soon: by block means by block, and looking for that next use in
            # every release takes time that grows with the square of the depth.
            "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": 2 * largest,
            "stage3_prefetch_bucket_size": 0 if self.keep_gathered else largest,
            "contiguous_gradients": False,  # or each gradient would be copied once more, into a buffer kept for that
            "reduce_bucket_size": largest,
            "overlap_comm": self.mesh.device.type == "cuda",
        }

    def _take_in(self, parameters: list[Any], settings: dict[str, Any]) -> None:
        if self.parameters:
            self.parameters[0].convert_to_zero_parameters(param_list=parameters)
        else:
            holder = nn.ParameterList(parameters)
            deepspeed.zero.Init(module=holder, data_parallel_group=self.mesh.data_group, config_dict_or_path=settings)
        for parameter in parameters:
            if self.keep_gathered:  # a sum over a step's micro-batches in bf16 would lose what is small
                parameter.grad_dtype = torch.float32
        super()._take_in(parameters, settings)

    def _flats(self) -> list[Tensor]:
        return list(self._zero.fp32_partitioned_groups_flat)

    def _shards(self, names: dict[int, str]) -> Iterator[Shard]:
        bases = _starts(self.masters)
        for parameter in (p for group in self._zero.fp16_groups for p in group):
            group, offset, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
            shape, total = tuple(parameter.ds_shape), parameter.ds_numel
            first = min(size * self.mesh.data_rank, total)  # the last ranks' ranges end in padding
            count, start = min(size, total - first), bases[group] + int(offset)
            yield Shard(names[id(parameter)], shape, first, count, start, slice_of(parameter))

    def _publish_masters(self) -> None:
        self._zero._partition_all_parameters()  # what a forward left gathered, or fetched ahead, is out of date
        for group in range(len(self.masters)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)


class Zero012(ZeroEngine):
    """Stages 0, 1 and 2: parameters whole on every rank, as slices of flat buffers."""

    def __init__(self, stage: int, *arguments: Any) -> None:
        self.stage = stage
        super().__init__(*arguments)

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._zero.zero_grad(set_to_none=True)
            raise
        if self.stage == 0 and self.mesh.data_size > 1:
            gradients = [self._zero.get_gradient_for_reduction(parameter) for parameter in self.parameters]
            flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(self.mesh.data_size)
            dist.all_reduce(flat, group=self.mesh.data_group)
            parts = flat.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)])

    def _model_parallel_unit(self) -> Any:
        if self.stage:
            return ModelParallelUnit
        alone = dist.new_group([self.mesh.rank], use_local_synchronization=True)
        members = {"get_data_parallel_group": alone, "get_data_parallel_rank": 0, "get_data_parallel_world_size": 1}
        return type("AloneUnit", (ModelParallelUnit,), {n: staticmethod(lambda v=v: v) for n, v in members.items()})

    def _zero_settings(self, largest: int) -> dict[str, Any]:
        return {
            "stage": max(self.stage, 1),
            "reduce_bucket_size": largest,
            "overlap_comm": self.stage == 2 and self.mesh.device.type == "cuda",
        }

    def _flats(self) -> list[Tensor]:
        return list(self._zero.single_partition_of_fp32_groups)

    def _writes(self, shard: Shard) -> bool:
        return super()._writes(shard) and (self.stage > 0 or self.mesh.data_rank == 0)

    def _shards(self, names: dict[int, str]) -> Iterator[Shard]:
        rank = self.mesh.data_rank if self.stage else 0
        for base, size, group in zip(
            _starts(self.masters), self._zero.partition_size, self._zero.bit16_groups, strict=True
        ):
            begin, end = rank * size, (rank + 1) * size  # of this rank, in the concatenation of the group's parameters
            at = 0
            for parameter in group:
                low, high = max(at, begin), min(at + parameter.numel(), end)
                if low < high:
                    yield Shard(
                        names[id(parameter)],
                        tuple(parameter.shape),
                        low - at,
                        high - low,
                        base + low - begin,
                        slice_of(parameter),
                    )
                at += parameter.numel()

    def _publish_masters(self) -> None:
        self._zero.update_lp_params()


def _settings(config: RunConfig, zero: dict[str, Any]) -> dict[str, Any]:
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


def _starts(flats: list[Tensor]) -> list[int]:
    return list(itertools.accumulate((flat.numel() for flat in flats[:-1]), initial=0))
