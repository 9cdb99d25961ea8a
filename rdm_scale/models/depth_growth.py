"""Depth growth (expansion): make a trained model deeper without changing the function that it computes.

Old blocks keep their values and their order. New blocks start with zero-initialized gates, alpha = beta = 0: a, b and
the rows of the modulation that produce g(c) are zero. New blocks add nothing to the residual stream at first, but they
learn from the first step on, because the gradient of a gate is its branch's output, whatever the value of the gate. A
plain residual has no gate that could be zero.

The multiplier of a and b (r m in models/gates.py) depends on the depth. The old a and b are therefore multiplied by
q = (r m)(old) / (r m)(new), which preserves the products that the network computes with. If the model has a base depth,
g(c) is multiplied by r, and the rows that produce it are rescaled in the same way, with q = r(old) / r(new).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from rdm_scale.config import ModelConfig
from rdm_scale.errors import ConfigError
from rdm_scale.models.gates import ResidualGate
from rdm_scale.models.initialization import initial_value

BlockPlacement = Literal["interleaved", "appended", "stacked"]

_GATES = (".gate.a", ".gate.b")


@dataclass(frozen=True)
class BlockOrigin:
    """Origin of a block of the grown model.

    Attributes:
        block: number of the old block whose values it takes; None if it is initialized afresh.
        is_new: True for a new block with zero-initialized gates, False for the old block itself.
    """

    block: int | None
    is_new: bool = False

    def in_group(self, size: int, i: int) -> "BlockOrigin":
        """Origin of block i of a group of `size` blocks, if this is the origin of the group."""
        return self if self.block is None else BlockOrigin(size * self.block + i, self.is_new)


FRESH = BlockOrigin(None, is_new=True)


def _interleaved(old: int, new: int) -> list[BlockOrigin]:
    places = {i * new // old: BlockOrigin(i) for i in range(old)}
    return [places.get(j, FRESH) for j in range(new)]


def _appended(old: int, new: int) -> list[BlockOrigin]:
    return [BlockOrigin(i) if i < old else FRESH for i in range(new)]


def _stacked(old: int, new: int) -> list[BlockOrigin]:
    return [BlockOrigin(i % old, is_new=i >= old) for i in range(new)]


_PLACEMENTS: dict[BlockPlacement, Callable[[int, int], list[BlockOrigin]]] = {
    "interleaved": _interleaved,
    "appended": _appended,
    "stacked": _stacked,
}


def block_origins(
    old: int, new: int, placement: BlockPlacement, stacking: str = "flow", kinds: int = 1
) -> tuple[BlockOrigin, ...]:
    """Origin of each block of a model that is grown from `old` to `new` blocks.

    Args:
        old: number of blocks before.
        new: number of blocks after.
        placement: `interleaved` spreads fresh blocks evenly between the old ones, as the block expansion of LLaMA Pro
            does (arXiv 2401.02415). `appended` puts them after the last one. `stacked` puts copies of all old blocks
            after them, as StackBERT does (Gong et al. 2019), but with zero-initialized gates.
        stacking: in a u stack, the placement applies to the first half, and the second half mirrors it, so that block
            i and block i from the end remain a pair; a block in the middle stays there.
        kinds: number of kinds of blocks that alternate along a flow stack (2 for factorized attention); groups of so
            many blocks stay together.

    Raises:
        ConfigError: there are not more blocks than before, or the placement or the stacking does not allow the number.
    """
    halves = 2 if stacking == "u" else 1
    if placement not in _PLACEMENTS:
        raise ConfigError(f"placement {placement!r}: choose {', '.join(get_args(BlockPlacement))}")
    if new <= old:
        raise ConfigError(f"a model of {old} blocks can only grow to more blocks, not to {new}")
    if stacking == "u" and ((new - old) % 2 or old < 2):
        raise ConfigError(
            f"a u stack grows by pairs of blocks, and must have at least one pair: {old} blocks cannot become {new}; "
            f"choose {new + 1} blocks, or a flow stack"
        )
    if new % kinds:
        raise ConfigError(f"{kinds} kinds of blocks alternate, so that their number must be a multiple: {new} is not")
    if placement == "stacked" and (new // halves) % (old // halves):
        raise ConfigError(
            f"placement stacked repeats all blocks: the new depth must be a multiple of the old, and {new} blocks are "
            f"not one of {old}; choose another depth or placement"
        )
    place = _PLACEMENTS[placement]
    if stacking == "flow":
        groups = place(old // kinds, new // kinds)
        return tuple(origin.in_group(kinds, i) for origin in groups for i in range(kinds))
    first = place(old // 2, new // 2)
    second = [BlockOrigin(None if o.block is None else old - 1 - o.block, o.is_new) for o in reversed(first)]
    return (*first, *[BlockOrigin(old // 2)] * (old % 2), *second)


class DepthGrowth:
    """Mapping of a model's parameters to those of a deeper model with the same function.

    Args:
        old: configuration of the model.
        depth: number of blocks of the deeper model.
        placement: places of the new blocks, see `block_origins`.

    Raises:
        ConfigError: the model cannot be grown, or not to this depth; says why.
    """

    def __init__(self, old: ModelConfig, depth: int, placement: BlockPlacement = "interleaved") -> None:
        if old.residual == "plain":
            raise ConfigError(
                "model.residual=plain cannot grow: its branches have no gate that could start at zero, so any new "
                "block would change the function of the network"
            )
        self.old, self.new = old, old.model_copy(update={"depth": depth})
        kinds = 2 if old.attention == "factorized" else 1
        self.origins = block_origins(old.depth, depth, placement, old.stacking, kinds)
        with torch.device("meta"):
            before, after = ResidualGate(self.old), ResidualGate(self.new)
        self._gate_ratio = before.multiplier / after.multiplier  # q of a and b
        self._conditional, self._conditional_ratio = after.conditional, before.ratio / after.ratio  # q of g(c)

    def source(self, name: str) -> str | None:
        """Name of the old parameter from which the grown model's parameter `name` is made; None if there is none."""
        origin, rest = self._locate(name)
        if origin is None:
            return name
        return None if origin.block is None else f"blocks.{origin.block}.{rest}"

    def is_new(self, name: str) -> bool:
        """True if the grown model's parameter `name` belongs to a new block."""
        origin, _ = self._locate(name)
        return origin is not None and origin.is_new

    def grown_value(self, name: str, source: Tensor) -> Tensor:
        """Value of the grown model's parameter `name`, given that of its source."""
        return self._without_gates(name, source) if self.is_new(name) else self.rescale_gates(name, source)

    def initial_value(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """Value of the grown model's parameter `name`, which has no source, as in a new model of this depth.

        The depth is part of the random key: a block that started at the same place of the shallower model must not
        have had the same initial values. All modulation starts at zero.
        """
        if name.endswith(_GATES):
            return torch.zeros(shape)
        return initial_value(f"depth {self.new.depth}: {name}", shape, seed, self.new)

    def rescale_gates(self, name: str, value: Tensor, power: int = 1) -> Tensor:
        """Multiply the gates among the elements of an old block's parameter by q^power.

        Power 1 preserves alpha and beta of a parameter's value. Other powers apply to what is stored beside it, such as
        its gradient (-1).
        """
        if name.endswith(_GATES):
            return value * self._gate_ratio**power
        if name.startswith("blocks.") and ".modulation." in name and self._conditional and self._conditional_ratio != 1:
            value = value.clone()
            self._gate_rows(value).mul_(self._conditional_ratio**power)
        return value

    def _locate(self, name: str) -> tuple[BlockOrigin | None, str]:
        """Origin of the parameter's block (None outside the blocks), and the parameter's name within the block."""
        if not name.startswith("blocks."):
            return None, name
        _, number, rest = name.split(".", 2)
        return self.origins[int(number)], rest

    def _gate_rows(self, modulation: Tensor) -> Tensor:
        """Rows that produce g(c): each branch has shift, scale and g of the model's width (models/blocks.py)."""
        return modulation.unflatten(0, (-1, 3, self.new.hidden_size))[:, 2]

    def _without_gates(self, name: str, value: Tensor) -> Tensor:
        """Copy of an old block's parameter with all gates set to zero."""
        if name.endswith(_GATES):
            return torch.zeros_like(value)
        if ".modulation." in name and self._conditional:
            value = value.clone()
            self._gate_rows(value).zero_()
        return value
