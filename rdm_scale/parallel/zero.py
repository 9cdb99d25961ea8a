"""The data-parallel axis under DeepSpeed ZeRO-3, and all that touches DeepSpeed (tested with 0.19.8).

Every rank keeps, of each parameter, one contiguous range of the flattened tensor: the fp32 master weights, Adam's
moments and whatever is averaged from them. `ZeroEngine.shards` says which, in terms of the parameters' own names, so
that nothing above this module needs to know how DeepSpeed arranges its buffers.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from rdm_scale.config import RunConfig
from rdm_scale.parallel.megatron import ModelParallelUnit
from rdm_scale.parallel.mesh import Mesh

_TESTED = "rdm_scale is tested with deepspeed 0.19.8"
_METHODS = ("get_param_id", "_partition_all_parameters", "_reassign_or_swap_out_partitioned_parameters")
_ATTRIBUTES = ("fp32_partitioned_groups_flat", "grad_position", "fp16_groups", "overflow", "_global_grad_norm")
for _name in _METHODS:
    if not callable(getattr(DeepSpeedZeroOptimizer_Stage3, _name, None)):
        raise ImportError(f"deepspeed {deepspeed.__version__} lacks ZeRO-3's {_name}; {_TESTED}")

if not hasattr(partitioned_param_coordinator, "assert_ints_same_as_other_ranks"):
    raise ImportError(f"deepspeed {deepspeed.__version__} no longer compares module orders; {_TESTED}")
# It compares numbers that count modules since the process began, over all ranks: they differ between pipeline stages,
# and between processes that have trained before.
partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda ints: None
# It calls what torch has renamed, in every collective; the pinned versions go together.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
# On CPUs DeepSpeed would spend a minute compiling an all-reduce for inference, which training never calls.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@dataclass(frozen=True)
class Shard:
    """A rank's range of one parameter: elements `first` to `first + count` of the flattened tensor of `shape`,
    found from element `start` of the rank's flat buffers."""

    name: str
    shape: tuple[int, ...]
    first: int
    count: int
    start: int


class ZeroEngine:
    """A model whose parameters, gradients and optimizer states are spread over the data-parallel ranks.

    `forward`, `backward` and `step` are collective: all ranks of the data-parallel group call them together.
    `masters`, and the tensors of `moments`, are this rank's flat fp32 buffers, all of one layout.
    """

    def __init__(
        self,
        model: nn.Module,
        config: RunConfig,
        mesh: Mesh,
        build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        leaves: list[type[nn.Module]],
    ) -> None:
        deepspeed_logger.setLevel(logging.ERROR)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.model_parallel = mesh.tensor_rank == 0  # type: ignore[attr-defined]  # counts once in the norm
        set_z3_leaf_modules(model, leaves)  # their parameters are gathered together
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model),
            config=_deepspeed_config(config, mesh, sum(parameter.numel() for parameter in model.parameters())),
            mpu=ModelParallelUnit,
            dist_init_required=False,
        )
        self.module: Any = self.engine.module
        self._zero: Any = self.engine.optimizer
        for name in _ATTRIBUTES:
            if not hasattr(self._zero, name):
                raise ImportError(f"deepspeed {deepspeed.__version__} lacks ZeRO-3's {name}; {_TESTED}")
        self.masters: list[Tensor] = [flat.detach() for flat in self._zero.fp32_partitioned_groups_flat]
        self.shards = self._shards(names, mesh.data_rank)

    def __call__(self, *inputs: Any) -> Tensor:
        return self.engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradient of a micro-batch's loss; the step uses the mean over the data-parallel ranks."""
        self.engine.backward(loss)

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
        optimizer, flats = self._zero.optimizer, self._zero.fp32_partitioned_groups_flat
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
        self._zero._partition_all_parameters()  # what a forward left gathered, or fetched ahead, is out of date
        for i, (master, flat) in enumerate(zip(self.masters, flats, strict=True)):
            if master is not flat:
                master.copy_(flat)
            self._zero._reassign_or_swap_out_partitioned_parameters(i)

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

    def _shards(self, names: dict[int, str], data_rank: int) -> list[Shard]:
        bases = [0]
        for master in self.masters:
            bases.append(bases[-1] + master.numel())
        shards = []
        for parameter in (p for group in self._zero.fp16_groups for p in group):
            group, offset, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
            shape, total = tuple(parameter.ds_shape), parameter.ds_numel
            first = min(size * data_rank, total)  # the last ranks' ranges end in padding
            shards.append(
                Shard(names[id(parameter)], shape, first, min(size, total - first), bases[group] + int(offset))
            )
        return shards


def _deepspeed_config(config: RunConfig, mesh: Mesh, parameters: int) -> dict[str, Any]:
    share = config.train.global_batch_size // mesh.data_size
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size or share,
        "gradient_accumulation_steps": 1,  # the trainer divides the loss by the number of micro-batches itself
        "gradient_clipping": config.optimizer.grad_clip,
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            "stage3_param_persistence_threshold": 0,
            "reduce_bucket_size": min(parameters, 500_000_000),  # allocated whole, in elements; else always the latter
            "overlap_comm": mesh.device.type == "cuda",
        },
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "communication_data_type": "fp32",
        "steps_per_print": 10**9,
    }
