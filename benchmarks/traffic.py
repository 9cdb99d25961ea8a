"""Counter of a process's collectives and messages, by kind and by mesh axis.

It works in torch's dispatcher, which sees the calls of torch.distributed, DeepSpeed and megatron-core alike: all end in
operators of the library c10d.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rdm_scale.parallel.mesh import Mesh
from rdm_scale.parallel.pipeline.channels import Channels

_KINDS = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "receive",
}
# Bytes that a rank of n sends for each byte of the largest operand, where the ranks form a ring.
_SENT: dict[str, Callable[[int], float]] = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "reduce": lambda n: (n - 1) / n,
    "broadcast": lambda n: (n - 1) / n,
    "send": lambda n: 1.0,
    "receive": lambda n: 0.0,
}


class TrafficCounter(TorchDispatchMode):
    """Context manager that counts calls and bytes by "axis kind", such as "data all-gather".

    `bytes` are those of the larger operand (everything gathered or reduced), `sent` those that leave this rank. The
    data axis includes groups of one rank, which send nothing; groups that span several axes count as "other".
    """

    def __init__(self, mesh: Mesh, channels: Channels | None = None) -> None:
        super().__init__()
        groups = {"tensor": [mesh.tensor_group], "pipeline": [mesh.pipeline_group], "data": [mesh.data_group]}
        if channels is not None:
            groups["pipeline"] += channels.groups
        self.axes = {group.group_name: axis for axis, members in groups.items() for group in members}
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.split("::")[1], [*args, *(kwargs or {}).values()])
        return func(*args, **(kwargs or {}))

    def _count(self, operator: str, arguments: list[Any]) -> None:
        kind, group = _KINDS.get(operator, operator), _group(arguments)
        size = max(map(_bytes, arguments))
        key = f"{self.axes.get(group.group_name, 'other')} {kind}"
        self.calls[key] += 1
        self.bytes[key] += size
        self.sent[key] += round(size * _SENT.get(kind, lambda n: 0.0)(group.size()))


def _group(arguments: list[Any]) -> Any:
    for argument in arguments:
        if isinstance(argument, torch.ScriptObject) and str(argument._type()).endswith(".ProcessGroup"):
            return dist.ProcessGroup.unbox(argument)
    raise ValueError("a collective without a process group")


def _bytes(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(_bytes, argument)) if isinstance(argument, list | tuple) else 0
