"""Refusal of NaN and infinity in what is saved and in what is loaded: a complete checkpoint need not be a good one."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rdm_scale.checkpoint.format.slices import SliceTable
from rdm_scale.errors import NonFiniteError

_CHUNK = 2**20  # elements that are tested at once; bounds the memory of the test
_SHOWN = 4  # names in a message
# The state entries as people call them.
ENTRY_NAMES = {"weights": "weights", "raw": "raw weights", "ema": "EMA weights", "exp_avg": "optimizer state (exp_avg)"}
ENTRY_NAMES |= {"exp_avg_sq": "optimizer state (exp_avg_sq)"}


def count_non_finite(values: NDArray[np.float32]) -> int:
    """Number of elements of a flat array that are NaN or infinite."""
    chunks = (np.isfinite(values[i : i + _CHUNK]) for i in range(0, len(values), _CHUNK))
    return sum(len(finite) - int(np.count_nonzero(finite)) for finite in chunks)


def refuse_non_finite_slices(table: SliceTable, entry: str, flat: Tensor, problem: str, advice: str) -> None:
    """Check a state entry of a rank.

    Args:
        table: the slices in `flat`; what no slice covers is not used, and ignored.
        problem: beginning of the message.
        advice: its end.

    Raises:
        NonFiniteError: with the names of the tensors.
    """
    values = flat.detach().numpy()
    if not count_non_finite(values):
        return
    slices = zip(table.slices.tensor.tolist(), table.slices.start.tolist(), table.ends.tolist(), strict=True)
    names = dict.fromkeys(table.names[tensor] for tensor, start, end in slices if count_non_finite(values[start:end]))
    if names:
        what = ENTRY_NAMES.get(entry, entry)
        raise NonFiniteError(f"{problem}: the {what} of {shown(list(names))} hold NaN or infinity. {advice}")


def refuse_non_finite_tensor(name: str, tensor: Tensor, where: object) -> Tensor:
    """Return the tensor that was read. Raises NonFiniteError if it is not finite."""
    if not torch.isfinite(tensor).all():
        raise NonFiniteError(
            f"{where} is complete, but cannot be used: {name} holds NaN or infinity. Use an earlier checkpoint"
        )
    return tensor


def shown(names: Sequence[str]) -> str:
    """Give the first of the names, and the number of others."""
    more = f" and {len(names) - _SHOWN} more tensors" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
