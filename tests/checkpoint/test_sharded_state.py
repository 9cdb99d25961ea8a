"""Mapping of a rank's parameter ranges to slices of logical tensors."""

import numpy as np
import torch

from rdm_scale.checkpoint.sharded_state import slice_table
from rdm_scale.models.layers import UNSHARDED, Slice
from rdm_scale.parallel.zero.engine import ParameterRange
from tests.support.tensor_layouts import listed, select


def test_slices_hold_the_elements_of_the_rank_s_buffer() -> None:
    """Parameters of several dimensions, sharded or not; each element is its position in the logical tensor."""
    kinds = [((6, 4), UNSHARDED), ((3, 4), Slice(0, 1, 2)), ((6, 2), Slice(1, 1, 2)), ((5,), Slice(0, 2, 3)),
             ((), UNSHARDED), ((2, 3, 2, 2), Slice(1, 0, 2))]  # fmt: skip
    logical, shards, start = {}, [], 3
    buffer = torch.full((200,), -1.0)
    for i, (shape, part) in enumerate(kinds):
        name, full_shape = f"t{i}", part.logical_shape(shape)
        logical[name] = torch.arange(torch.Size(full_shape).numel(), dtype=torch.float32).view(full_shape)
        size = torch.Size(shape).numel()
        first, count = (1, size - 2) if size > 2 else (0, size)
        local = logical[name] if part is UNSHARDED else part.of(logical[name])
        buffer[start : start + count] = local.flatten()[first : first + count]
        shards.append(ParameterRange(name, shape, first, count, start, part))
        start += count + 2
    shards.append(ParameterRange("elsewhere", (4, 4), 16, 0, start, UNSHARDED))
    table = slice_table(shards)
    assert table.names == list(logical)
    seen = np.zeros(200, bool)
    for item in listed(table):
        assert item.shape == tuple(logical[item.name].shape)
        place = slice(item.start, item.start + item.region.numel)
        assert torch.equal(buffer[place], select(logical[item.name], item.region).flatten())
        seen[place] = True
    assert seen.tolist() == (buffer >= 0).tolist()


def test_a_rank_without_elements_has_no_slices() -> None:
    assert listed(slice_table([])) == [] == listed(slice_table([ParameterRange("a", (3,), 3, 0, 0, UNSHARDED)]))
