"""Growing a trained model in depth without changing what it computes.

The old blocks keep their values and their order. New blocks start with closed gates, alpha = beta = 0: a, b and the
rows of the modulation that make g(c) are zero. They add nothing to the stream, and learn from the first step on, since
the gradient of a gate is its branch's output, whatever the gate. A plain residual has no gate to close.

What a and b are multiplied by (r m in models/gates.py) is another number at the new depth, so the old a and b are
multiplied by q = (r m)(old) / (r m)(new): the products, which is what the network computes with, stay. A loss that is
the same function of them has a gradient 1/q as large in the new a, so that Adam's first moment is multiplied by 1/q and
its second by 1/q^2. Where the model has a base depth, g(c) is multiplied by r, and the rows that make it are treated
alike, with q = r(old) / r(new).
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

Placement = Literal["interleaved", "appended", "stacked"]

_POWERS: dict[str, int] = {"weights": 1, "ema": 1, "exp_avg": -1, "exp_avg_sq": -2}  # of q, by which a gate scales
_GATES = (".gate.a", ".gate.b")


@dataclass(frozen=True)
class Origin:
    """What a block of the grown model is made of: the old block of this number, or none: drawn afresh. With `closed`
    gates it is a new block, otherwise the old one itself."""

    block: int | None
    closed: bool = False

    def within(self, size: int, i: int) -> "Origin":
        """Of block i in a group of blocks of that size, when this is the group's."""
        return self if self.block is None else Origin(size * self.block + i, self.closed)


FRESH = Origin(None, closed=True)


def _interleaved(old: int, new: int) -> list[Origin]:
    places = {i * new // old: Origin(i) for i in range(old)}
    return [places.get(j, FRESH) for j in range(new)]


def _appended(old: int, new: int) -> list[Origin]:
    return [Origin(i) if i < old else FRESH for i in range(new)]


def _stacked(old: int, new: int) -> list[Origin]:
    return [Origin(i % old, closed=i >= old) for i in range(new)]


_PLACEMENTS: dict[Placement, Callable[[int, int], list[Origin]]] = {
    "interleaved": _interleaved,
    "appended": _appended,
    "stacked": _stacked,
}


def origins(old: int, new: int, placement: Placement, stacking: str = "flow", turns: int = 1) -> tuple[Origin, ...]:
    """What each of the `new` blocks of a model grown from `old` blocks is made of.

    Args:
        placement: interleaved spreads fresh blocks evenly between the old ones, as LLaMA Pro's block expansion does
            (arXiv 2401.02415); appended puts them behind the last; stacked puts whole copies of the old stack behind
            it, as StackBERT does (Gong et al. 2019), but with the copies' gates closed.
        stacking: in a u stack the blocks before the middle are placed so, and those behind it mirror them, so that
            block i and the last but i remain a pair; a block in the middle stays there.
        turns: kinds of blocks that take turns along a flow (factorized attention: 2); so many stay together.

    Raises:
        ConfigError: fewer blocks than before, or a number that the placement or the stacking cannot have.
    """
    halves = 2 if stacking == "u" else 1
    if placement not in _PLACEMENTS:
        raise ConfigError(f"placement {placement!r}: choose {', '.join(get_args(Placement))}")
    if new <= old:
        raise ConfigError(f"a model of {old} blocks grows to more of them, not to {new}")
    if stacking == "u" and ((new - old) % 2 or old < 2):
        raise ConfigError(
            f"a u stack grows by pairs of blocks, and from one pair on: {old} blocks cannot become {new}; "
            f"choose {new + 1} blocks, or a stack of flow"
        )
    if new % turns:
        raise ConfigError(f"{turns} kinds of blocks take turns, and {new} blocks do not end with the last of them")
    if placement == "stacked" and (new // halves) % (old // halves):
        raise ConfigError(
            f"placement stacked repeats the whole stack: the new depth must be a multiple of the old, and {new} blocks "
            f"are not one of {old}; choose another depth or placement"
        )
    place = _PLACEMENTS[placement]
    if stacking == "flow":
        groups = place(old // turns, new // turns)
        return tuple(o.within(turns, i) for o in groups for i in range(turns))
    first = place(old // 2, new // 2)
    second = [Origin(None if o.block is None else old - 1 - o.block, o.closed) for o in reversed(first)]
    return (*first, *[Origin(old // 2)] * (old % 2), *second)


class Growth:
    """Where the tensors of a deeper model come from, by name, and what becomes of their values.

    Raises:
        ConfigError: the model cannot be grown, or not to this depth; says why.
    """

    def __init__(self, old: ModelConfig, depth: int, placement: Placement = "interleaved") -> None:
        if old.residual == "plain":
            raise ConfigError(
                "model.residual=plain cannot grow: its branches have no gate that could start closed, so any new block "
                "would change what the network computes"
            )
        self.old, self.new = old, old.model_copy(update={"depth": depth})
        turns = 2 if old.attention == "factorized" else 1
        self.blocks = origins(old.depth, depth, placement, old.stacking, turns)
        with torch.device("meta"):
            before, after = ResidualGate(self.old), ResidualGate(self.new)
        self._ratio, self._conditional = before.multiplier / after.multiplier, after.conditional
        self._conditional_ratio = before.ratio / after.ratio  # of what g(c) is multiplied by

    def source(self, name: str) -> str | None:
        """The old tensor that the grown model's tensor `name` is made of; None where it is drawn afresh."""
        origin, rest = self._locate(name)
        if origin is None:
            return name
        return None if origin.block is None else f"blocks.{origin.block}.{rest}"

    def is_new(self, name: str) -> bool:
        """Whether the grown model's tensor `name` belongs to a new block."""
        origin, _ = self._locate(name)
        return origin is not None and origin.closed

    def carried(self, name: str, field: str, value: Tensor) -> Tensor:
        """The tensor `name` of the grown model in one field of a checkpoint, given the same field of its source."""
        if not self.is_new(name):
            return self._rescaled(name, field, value)
        return self._closed(name, value) if field in ("weights", "ema") else torch.zeros_like(value)

    def fresh(self, name: str, field: str, shape: torch.Size, seed: int) -> Tensor:
        """The tensor `name` that has no source, as in a new model of this depth (where all modulation is zero).

        The depth is part of the key: the old block that once began under this name, at its place in the shallower
        model, must not have begun with the same values.
        """
        if field in ("exp_avg", "exp_avg_sq") or name.endswith(_GATES):
            return torch.zeros(shape)
        return initial_value(f"depth {self.new.depth}: {name}", shape, seed, self.new)

    def _locate(self, name: str) -> tuple[Origin | None, str]:
        """Origin of the block that the tensor is in (None outside of blocks), and its name within."""
        if not name.startswith("blocks."):
            return None, name
        _, number, rest = name.split(".", 2)
        return self.blocks[int(number)], rest

    def _rescaled(self, name: str, field: str, value: Tensor) -> Tensor:
        """Of an old block, so that its alpha and beta stay."""
        if name.endswith(_GATES):
            return value * self._ratio ** _POWERS[field]
        if name.startswith("blocks.") and ".modulation." in name and self._conditional and self._conditional_ratio != 1:
            value = value.clone()
            self._gate_rows(value).mul_(self._conditional_ratio ** _POWERS[field])
        return value

    def _gate_rows(self, modulation: Tensor) -> Tensor:
        """The rows that make g(c): by branch there are shift, scale and g, a width of each (models/blocks.py)."""
        return modulation.unflatten(0, (-1, 3, self.new.hidden_size))[:, 2]

    def _closed(self, name: str, value: Tensor) -> Tensor:
        if name.endswith(_GATES):
            return torch.zeros_like(value)
        if ".modulation." in name and self._conditional:
            value = value.clone()
            self._gate_rows(value).zero_()
        return value
