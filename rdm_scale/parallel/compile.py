"""Compilation of blocks (`train.compile`): each kind of block is compiled once, and all blocks of that kind share it.

Compiled is the function of a block, with the block as an argument, so that a thousand blocks compile as fast as one.
It must be one graph: a graph break is an error, not a silent return to the interpreter. Embeddings, head and loss,
which run once a micro-batch, are not compiled.

Every new shape of the inputs compiles again. After `train.compile_shapes` of them all further shapes share one function
whose numbers of tokens and samples are symbols.
"""

import importlib.util
import os
import shutil
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rdm_scale.config import RunConfig
from rdm_scale.errors import ConfigError
from rdm_scale.models.blocks import Block, BlockFunction, Conditioning
from rdm_scale.parallel.recompute import block_function

Report = Callable[[str], None]

backend: str = "inductor"
"""Backend of torch.compile. Tests that count graphs set it to one that generates no code."""


def wants_compilation(config: RunConfig, device: torch.device, report: Report) -> bool:
    """Decide whether to compile.

    Raises:
        ConfigError: `train.compile=true`, and this machine lacks a compiler.
    """
    choice = config.train.compile
    if choice == "false" or (choice == "auto" and device.type != "cuda"):
        return False
    obstacle = _obstacle(device)
    if obstacle is None:
        return True
    if choice == "true":
        raise ConfigError(f"train.compile=true: {obstacle}; install it or set train.compile=false")
    report(f"compile: no, blocks run eagerly: {obstacle}")
    return False


def _obstacle(device: torch.device) -> str | None:
    """Name what torch.compile lacks on this machine, or None."""
    if backend != "inductor":
        return None
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton, which generates code for GPUs, is not installed"
    variable, names = ("CC", ("gcc", "cc", "clang")) if device.type == "cuda" else ("CXX", ("g++", "c++", "clang++"))
    if not any(map(shutil.which, filter(None, (os.environ.get(variable), *names)))):
        return f"there is no {names[0]} (or other compiler named by {variable})"
    return None


class CompiledFunction:
    """A block's function, compiled; shared by all blocks of one kind.

    Attributes:
        eager: run the function itself for now.

    Args:
        name: of the kind, for messages.
        shapes: number of shapes that are compiled exactly.
    """

    def __init__(self, function: BlockFunction, name: str, shapes: int, report: Report) -> None:
        self.function, self.name, self.limit, self.report = function, name, shapes, report
        self.eager = False
        self._exact = torch.compile(_own_code(function), backend=backend, fullgraph=True, dynamic=False)
        self._symbolic = torch.compile(_own_code(function), backend=backend, fullgraph=True)
        self._shapes: set[Any] = set()

    def __call__(
        self, block: Block, z_SBD: Tensor, conditioning: Conditioning, skip_SBD: Tensor | None = None
    ) -> Tensor:
        if self.eager:
            return self.function(block, z_SBD, conditioning, skip_SBD)
        if skip_SBD is not None:
            # Otherwise the middle of a u stack, where the skip is the stream itself, would compile once more.
            skip_SBD = skip_SBD.view_as(skip_SBD)
        _mark(1, _of_captions(conditioning))
        if self._is_exact(z_SBD, conditioning):
            return self._exact(block, z_SBD, conditioning, skip_SBD)
        if z_SBD._is_view():
            z_SBD = z_SBD.clone()  # symbols of the tensor that it is a view of would belong to the function's guards
        _mark(0, (z_SBD, skip_SBD, conditioning.embedding, *(conditioning.text or ())))
        _mark(1, (z_SBD, skip_SBD, conditioning.rope))
        return self._symbolic(block, z_SBD, conditioning, skip_SBD)

    def _is_exact(self, z_SBD: Tensor, conditioning: Conditioning) -> bool:
        """Count the shapes, without gradients apart, and tell those within the limit from those beyond."""
        shape = (*z_SBD.shape, conditioning.grid[0], torch.is_grad_enabled())
        if shape in self._shapes:
            return True
        if len(self._shapes) < self.limit:
            self._shapes.add(shape)
            return True
        if self.limit:
            self.report(
                f"compile: more than {self.limit} shapes of {self.name} blocks; further ones share one function whose "
                "numbers of tokens and samples are symbols, which is slower (train.compile_shapes)"
            )
            self.limit = 0
        return False


class CompiledBlocks:
    """The compiled blocks of one rank."""

    def __init__(self, blocks: Iterable[nn.Module], config: RunConfig, report: Report) -> None:
        self.functions: dict[tuple[str, BlockFunction], CompiledFunction] = {}
        shapes = config.train.compile_shapes
        # Dynamo would otherwise return to the interpreter, or fail, after 8 compilations of one function.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * shapes)
        number = 0
        for position, block in enumerate(blocks):
            assert isinstance(block, Block)
            function = block_function(config.parallel.recompute, position)
            key = (block.kind, function)
            if key not in self.functions:
                self.functions[key] = CompiledFunction(function, block.kind, shapes, report)
            block.function = self.functions[key]
            number += 1
        kinds = "; ".join(dict.fromkeys(name for name, _ in self.functions))
        report(
            f"compile: {number} blocks on a rank share {len(self.functions)} compiled functions ({kinds}); embeddings, "
            "head and loss run eagerly, once a micro-batch"
        )

    @contextmanager
    def running_eagerly(self) -> Iterator[None]:
        """Context in which blocks run as if they were not compiled: hooks inside them are called."""
        for function in self.functions.values():
            function.eager = True
        try:
            yield
        finally:
            for function in self.functions.values():
                function.eager = False


def _own_code(function: Any) -> Any:
    """Copy of a function with a code object of its own, by which Dynamo finds what it has compiled."""
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__)


def _of_captions(conditioning: Conditioning) -> tuple[Tensor, ...]:
    """Tensors whose second dimension is the number of caption tokens, which differs from batch to batch."""
    return () if conditioning.text is None else (conditioning.text.tokens, conditioning.text.mask)


def _mark(dim: int, tensors: Iterable[Tensor | None]) -> None:
    """Declare a dimension of tensors as symbolic."""
    for tensor in tensors:
        if tensor is not None and tensor.shape[dim] > 1:
            torch._dynamo.mark_dynamic(tensor, dim)
