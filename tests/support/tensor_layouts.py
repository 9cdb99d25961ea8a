"""Small tensors, and the slices of them that the ranks of several layouts hold."""

import itertools
import math
import random

import torch
from torch import Tensor

from rdm_scale.checkpoint.format.index import BLOCK_BYTES, FileRecord
from rdm_scale.checkpoint.format.slices import Region, SliceTable, TensorSlice, regions_of_range, shape_of
from rdm_scale.checkpoint.format.writer import write_tensors
from rdm_scale.storage.location import Location

SHAPES: dict[str, tuple[int, ...]] = {
    "scale": (),
    "bias": (13,),
    "qkv.weight": (12, 7),  # split by rows under tensor parallelism
    "out.weight": (5, 8),  # split by columns
    "patch.weight": (4, 3, 2, 3),
    "positions": (1, 6, 5),
}
ROWS, COLUMNS = {"qkv.weight"}, {"out.weight"}
PADDING = -7.0  # value of elements that must be neither written nor overwritten


def layout(tensor_size: int, data_size: int, uneven: bool = False) -> list[list[TensorSlice]]:
    """Slices of every rank: some tensors are split for tensor parallelism, and each flattened part is then split into
    ZeRO-3 ranges with padding.
    """
    rng = random.Random(0)
    ranks = []
    for tensor_rank, data_rank in itertools.product(range(tensor_size), range(data_size)):
        slices, start = [], rng.randint(0, 3)
        for name, shape in SHAPES.items():
            local, offset = list(shape), [0] * len(shape)
            if name in ROWS | COLUMNS:
                dimension = 0 if name in ROWS else 1
                local[dimension] //= tensor_size
                offset[dimension] = tensor_rank * local[dimension]
            elif tensor_rank > 0:
                continue  # replicated: one of the ranks writes it
            size = math.prod(local)
            share = math.ceil(size / data_size)
            if uneven:
                share = max(1, share - 2)
            first = min(data_rank * share, size)
            count = size - first if data_rank == data_size - 1 else min(share, size - first)
            position = start
            for region in regions_of_range(local, first, count):
                slices.append(TensorSlice(name, shape, shifted(region, offset), position))
                position += region.numel
            start += max(share, count) + rng.randint(0, 2)
        ranks.append(slices)
    return ranks


def shifted(region: Region, offset: list[int]) -> Region:
    return Region(tuple(a + b for a, b in zip(region.offset, offset, strict=True)), region.extent)


def select(tensor: Tensor, region: Region) -> Tensor:
    """The region's elements of a logical tensor."""
    return tensor[tuple(slice(o, o + n) for o, n in zip(region.offset, region.extent, strict=True))]


def listed(table: SliceTable) -> list[TensorSlice]:
    """The slices of a table, one by one."""
    arrays = table.slices
    columns = zip(arrays.tensor, arrays.offset.T.tolist(), arrays.extent.T.tolist(), arrays.start.tolist(), strict=True)
    found = []
    for tensor, offset, extent, start in columns:
        shape = shape_of(table.shapes, tensor)
        n = len(shape)
        assert offset[n:] == [0] * (len(offset) - n) and extent[n:] == [1] * (len(extent) - n)
        found.append(TensorSlice(table.names[tensor], shape, Region(tuple(offset[:n]), tuple(extent[:n])), start))
    return found


def flat(slices: list[TensorSlice], values: dict[str, Tensor]) -> Tensor:
    """Flat buffer with the slices of these logical tensors; all other elements are `PADDING`."""
    out = torch.full((max((s.start + s.region.numel for s in slices), default=0) + 2,), PADDING)
    for item in slices:
        out[item.start : item.start + item.region.numel] = select(values[item.name], item.region).flatten()
    return out


ENTRIES = {
    entry: {name: torch.randn(shape, generator=torch.Generator().manual_seed(i)) for name, shape in SHAPES.items()}
    for i, entry in enumerate(("weights", "exp_avg", "exp_avg_sq", "ema"))
}
LAYOUTS = {
    "1": layout(1, 1),
    "dp2": layout(1, 2),
    "dp3": layout(1, 3),
    "dp4, uneven": layout(1, 4, uneven=True),
    "tp2": layout(2, 1),
    "tp2 dp3": layout(2, 3),
    "tp4 dp2, uneven": layout(4, 2, uneven=True),
    "dp17": layout(1, 17),
}


def write(folder: Location, ranks: list[list[TensorSlice]], block_bytes: int = BLOCK_BYTES) -> list[FileRecord]:
    """Write the files of all ranks and return their records."""
    records = []
    for rank, slices in enumerate(ranks):
        flats = {entry: flat(slices, values) for entry, values in ENTRIES.items()}
        records += write_tensors(folder, rank, SliceTable.of(slices), flats, block_bytes)
    return records
