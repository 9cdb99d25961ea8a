"""The data-parallel axis under DeepSpeed ZeRO.

Every rank keeps, of its part of the model, flat fp32 buffers: master weights, optimizer state and EMA weights.
`ZeroEngine.ranges` lists which ranges of which parameters they hold, so that nothing above this package needs to know
how DeepSpeed arranges its buffers.

    stage 3  parameters, gradients and optimizer states sharded; parameters are gathered a block at a time for every
             forward and backward, or once a step (`keep_gathered`)
    stage 2  gradients and optimizer states sharded; gradients are reduced after every backward
    stage 1  optimizer states sharded; gradients are reduced once a step
    stage 0  nothing sharded: stage 1 over a group of one rank, after gradients have been averaged over the data group
"""

import contextlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rdm_scale.config import RunConfig
from rdm_scale.models.layers import Slice, slice_of
from rdm_scale.parallel.megatron_adapter import ModelParallelUnit
from rdm_scale.parallel.mesh import Mesh
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
    """A rank's part of the model, with its gradients and optimizer states spread over the data-parallel ranks.

    Calling it runs the module's forward. All methods are collective over the data-parallel group.

    Attributes:
        master_weights: this rank's flat fp32 buffers.
        ranges: what those buffers, and those of the optimizer state, hold.
        owned_ranges: the ranges that this rank and no other writes into a checkpoint.
        blocks: the module's blocks by number.
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
        self.mesh = mesh
        self.blocks = {int(name): block for name, block in module.get_submodule("blocks").named_children()}
        self.parameters: list[Any] = []
        largest = max(sum(p.numel() for p in m.parameters()) for m in module.modules() if isinstance(m, tuple(leaves)))
        settings = deepspeed.settings(config, self._zero_settings(largest))
        for child in real:
            child.to(torch.bfloat16 if config.train.precision == "bf16" else torch.float32)
            self._take_in(list(child.parameters()), settings)
        self.optimizer = self._start(module, build_optimizer(module), settings, self._model_parallel_unit(), leaves)
        self.master_weights: list[Tensor] = [flat.detach() for flat in self.optimizer.masters]
        self.ranges = list(self._ranges({id(p): name for name, p in module.named_parameters()}))
        self.owned_ranges = [one for one in self.ranges if self._owns(one)]

    def __call__(self, *inputs: Any) -> Any:
        return self.optimizer.engine(*inputs)

    @abstractmethod
    def accumulating(self) -> contextlib.AbstractContextManager[None]:
        """Around all forwards and backwards of one step; on leaving, the gradients have been averaged."""

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Adds to the gradients; the step uses their mean over the data-parallel ranks."""
        self.optimizer.begin_backward()
        torch.autograd.backward(outputs, gradients)

    def step(self, lr: float) -> float:
        """Clips, updates the weights, each group at `lr` times its own factor, and returns the global gradient norm
        before clipping.

        With a gradient that is not finite nothing is updated, and the norm returned is inf.
        """
        for group in self.optimizer.plain.param_groups:
            group["lr"] = lr * group["lr_scale"]
        return self.optimizer.step()

    def optimizer_state(self) -> OptimizerState:
        """Adam's state as flat buffers, laid out as the master weights."""
        states = [self.optimizer.plain.state[flat] for flat in self.optimizer.masters]
        return OptimizerState([state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states])

    def reset_optimizer_state(self, step: int) -> None:
        """Make an optimizer state of zeros, to be filled by the caller, that counts `step` steps."""
        for flat in self.optimizer.masters:
            self.optimizer.plain.state[flat] = {
                "step": torch.tensor(float(step), device=flat.device),
                "exp_avg": torch.zeros_like(flat.detach()),
                "exp_avg_sq": torch.zeros_like(flat.detach()),
            }
        for group in self.optimizer.plain.param_groups:
            if "step" in group:  # apex counts here
                group["step"] = step

    def publish_master_weights(self) -> None:
        """Make the next forward compute with the master weights as they are now."""
        self.optimizer.publish_masters()

    @contextlib.contextmanager
    def recording_gradients(self) -> Iterator[dict[int, Tensor]]:
        """Context in which `step` records squared gradient norms by block.

        Yields:
            By block number, the sum of the squares (float64) of the gradient's elements in this rank's owned ranges,
            after clipping. Filled by the `step` within.
        """
        squares: dict[int, Tensor] = {}
        seen: set[int] = set()  # flat buffers, by where they start: stage 3 may step them one by one

        def record(*_: Any) -> None:
            for start, flat in zip(_starts(self.master_weights), self.optimizer.masters, strict=True):
                if flat.grad is not None and start not in seen:
                    seen.add(start)
                    gradient = flat.grad.detach().flatten()
                    for one in self.owned_ranges:
                        if start <= one.start < start + flat.numel() and one.name.startswith("blocks."):
                            norm = torch.linalg.vector_norm(
                                gradient[one.start - start :][: one.numel], dtype=torch.float32
                            )
                            block = int(one.name.split(".")[1])
                            squares[block] = squares.get(block, norm.new_zeros((), dtype=torch.float64))
                            squares[block] += norm.double().square()

        hook = self.optimizer.plain.register_step_pre_hook(record)
        try:
            yield squares
        finally:
            hook.remove()

    @contextlib.contextmanager
    def swapped_weights(self, weights: list[Tensor]) -> Iterator[None]:
        """Context in which the model computes with other weights, given as flat buffers."""
        kept = [master.clone() for master in self.master_weights]
        self._load(weights)
        try:
            yield
        finally:
            self._load(kept)

    @torch.no_grad()
    def _load(self, weights: list[Tensor]) -> None:
        torch._foreach_copy_(self.master_weights, weights)
        self.publish_master_weights()

    def parameter_tensors(self) -> list[Tensor]:
        """Parameters as forwards use them and, with stage 3, this rank's shards of them."""
        return self.optimizer.parameter_tensors(self.parameters)

    def gradient_tensors(self) -> list[Tensor]:
        """Buffers that hold gradients, or will when a backward runs."""
        return self.optimizer.gradient_tensors(self.parameters)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Context without gradients or dropout."""
        self.optimizer.engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.optimizer.engine.train()

    def _take_in(self, parameters: list[Any], settings: dict[str, Any]) -> None:
        """Is given the parameters of each child that has become real."""
        for parameter in parameters:  # one that the tensor-parallel ranks share counts once in the norm
            parameter.model_parallel = slice_of(parameter).count > 1 or self.mesh.tensor_rank == 0
        self.parameters += parameters

    def _model_parallel_unit(self) -> Any:
        return ModelParallelUnit

    def _owns(self, one: ParameterRange) -> bool:
        return one.numel > 0 and (one.part.count > 1 or self.mesh.tensor_rank == 0)

    @abstractmethod
    def _zero_settings(self, largest: int) -> dict[str, Any]:
        """DeepSpeed's zero_optimization; `largest` is the number of parameters of the largest leaf."""

    @abstractmethod
    def _start(self, *arguments: Any) -> Any:
        """DeepSpeed's optimizer of this stage."""

    @abstractmethod
    def _ranges(self, names: dict[int, str]) -> Iterator[ParameterRange]:
        """List what the flat buffers hold; `names` are those of the parameters, by id."""


class Zero3(ZeroEngine):
    """Stage 3. With `keep_gathered` all parameters of this rank are gathered once a step, and their gradients reduced
    once; without, a block's are gathered for each of its forwards and backwards and reduced after each backward."""

    optimizer: deepspeed.Stage3Optimizer

    def __init__(self, *arguments: Any, keep_gathered: bool, **more: Any) -> None:
        self.keep_gathered = keep_gathered
        self._inputs: dict[Any, int] = {}  # of each module: how many of its tensor inputs have a gradient
        super().__init__(*arguments, **more)
        if keep_gathered:
            self.optimizer.remove_hooks()

    def __call__(self, *inputs: Any) -> Any:
        outputs = super().__call__(*inputs)
        for module in () if self.keep_gathered else self.optimizer.engine.module.modules():
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
            self.optimizer.begin_step_of_hooks()
            yield
            return
        self.optimizer.gather()
        try:
            if self.mesh.data_size == 1:
                self._accumulate_in_place()
            yield
            if self.mesh.data_size > 1:
                self._reduce()
        finally:
            for parameter in self.parameters:
                parameter.grad = None
        self.optimizer.release()
        self.optimizer.end_step_of_ours()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        with super().evaluating():
            if self.keep_gathered:
                self.optimizer.gather()
            yield
            if self.keep_gathered:
                self.optimizer.release()

    def _accumulate_in_place(self) -> None:
        """Makes backwards add to the buffer from which DeepSpeed steps: one rank has nothing to reduce."""
        mine = self.optimizer.gradients.zero_()
        sizes = [parameter.numel() for parameter in self.optimizer.parameters]
        for parameter, part in zip(self.optimizer.parameters, mine.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)

    @torch.no_grad()
    def _reduce(self) -> None:
        """One reduce-scatter of all gradients, into the buffer from which DeepSpeed steps."""
        size, mine = self.mesh.data_size, self.optimizer.gradients
        whole = mine.new_zeros(size, mine.numel())
        start = 0
        for parameter in self.optimizer.parameters:
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
            # Instead of torch's own linear layers, whose backwards keep what they were given of a parameter from being
            # released after a forward. They are the faster ones, and here nothing is released before the last backward.
            "memory_efficient_linear": not self.keep_gathered,
        }

    def _take_in(self, parameters: list[Any], settings: dict[str, Any]) -> None:
        deepspeed.shard(parameters, self.parameters, self.mesh.data_group, settings)
        for parameter in parameters:
            if self.keep_gathered:  # a sum over a step's micro-batches in bf16 would lose what is small
                parameter.grad_dtype = torch.float32
        super()._take_in(parameters, settings)

    def _start(self, *arguments: Any) -> deepspeed.Stage3Optimizer:
        return deepspeed.Stage3Optimizer(*arguments)

    def _ranges(self, names: dict[int, str]) -> Iterator[ParameterRange]:
        bases = _starts(self.master_weights)
        for parameter in self.optimizer.parameters:
            group, offset, size = self.optimizer.share_of(parameter)
            shape, total = tuple(parameter.ds_shape), parameter.ds_numel
            first = min(size * self.mesh.data_rank, total)  # the last ranks' ranges end in padding
            count, start = min(size, total - first), bases[group] + offset
            yield ParameterRange(names[id(parameter)], shape, first, count, start, slice_of(parameter))


class Zero012(ZeroEngine):
    """Stages 0, 1 and 2: parameters whole on every rank, as slices of flat buffers."""

    optimizer: deepspeed.Stage12Optimizer

    def __init__(self, stage: int, *arguments: Any) -> None:
        self.stage = stage
        super().__init__(*arguments)

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.optimizer.drop_gradients()
            raise
        if self.stage == 0 and self.mesh.data_size > 1:
            gradients = self.optimizer.gradients_of(self.parameters)
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
            "use_multi_rank_bucket_allreduce": False,  # each gradient is reduced to its owner, not to all ranks
            "reduce_bucket_size": largest,
            "overlap_comm": self.stage == 2 and self.mesh.device.type == "cuda",
        }

    def _start(self, *arguments: Any) -> deepspeed.Stage12Optimizer:
        return deepspeed.Stage12Optimizer(*arguments)

    def _owns(self, one: ParameterRange) -> bool:
        return super()._owns(one) and (self.stage > 0 or self.mesh.data_rank == 0)

    def _ranges(self, names: dict[int, str]) -> Iterator[ParameterRange]:
        rank = self.mesh.data_rank if self.stage else 0
        for base, (group, size) in zip(_starts(self.master_weights), self.optimizer.groups, strict=True):
            begin, end = rank * size, (rank + 1) * size  # of this rank, in the concatenation of the group's parameters
            at = 0
            for parameter in group:
                low, high = max(at, begin), min(at + parameter.numel(), end)
                if low < high:
                    yield ParameterRange(
                        names[id(parameter)],
                        tuple(parameter.shape),
                        low - at,
                        high - low,
                        base + low - begin,
                        slice_of(parameter),
                    )
                at += parameter.numel()


def _starts(flats: list[Tensor]) -> list[int]:
    return list(itertools.accumulate((flat.numel() for flat in flats[:-1]), initial=0))
