"""Counters of what the host does in a training step: Python calls, values that it reads, tensors that it makes."""

import sys
from collections import Counter
from types import FrameType, FunctionType
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Methods and functions that read what a tensor holds, or copy it to where the host can.
_READS = {
    "tolist",
    "numpy",
    "cpu",
    "item",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "nonzero",
    "equal",
    "unique",
}


class ReadCounter(TorchFunctionMode):
    """Counter of reads in Python code: each makes the host wait for a GPU. `tensors` counts those made of host data."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.tensors = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READS:
            self.reads[name] += 1
        if func in (torch.tensor, torch.as_tensor, torch.from_numpy) and not isinstance(args[0], Tensor):
            self.tensors += 1
        return func(*args, **(kwargs or {}))


class ScalarCounter(TorchDispatchMode):
    """Counter of scalars that any code, C++ included, reads from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class HostWork(TorchDispatchMode):
    """Finder of operators that touch the host, in a computation whose tensors are all on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.found[f"{func} reads"] += 1
            raise AssertionError("a value of the meta device is read")
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self.found[str(func)] += 1
                break
        return result


class CallCounter:
    """Counter of Python calls in a context, without those of one function and all that it calls."""

    def __init__(self, without: FunctionType) -> None:
        self.calls: Counter[str] = Counter()
        self._left_out = without.__code__
        self._inside: FrameType | None = None

    def __enter__(self) -> Self:
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _profile(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and self._inside is None:
            if frame.f_code is self._left_out:
                self._inside = frame
            else:
                self.calls[f"{frame.f_code.co_filename}:{frame.f_code.co_qualname}"] += 1
        elif event == "return" and frame is self._inside:
            self._inside = None
