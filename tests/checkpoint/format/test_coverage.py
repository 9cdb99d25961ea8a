"""Coverage bounds: a reader opens all files that hold something it needs, and few others."""

from typing import NamedTuple

import pytest
import torch

from rdm_scale.checkpoint.directory import CheckpointDirectory, open_checkpoint
from rdm_scale.checkpoint.format.coverage import CoverageBounds, CoverageQuery, coverage_bounds, name_order
from rdm_scale.checkpoint.format.index import INDEX, FileRecord
from rdm_scale.checkpoint.format.reader import ReadOptions, TensorReader
from rdm_scale.checkpoint.format.slices import Region, SliceTable, TensorSlice, regions_of_range
from rdm_scale.checkpoint.format.writer import write_tensors
from rdm_scale.errors import CheckpointError
from rdm_scale.storage.location import Location

STAGES, SHARES, BLOCKS = 4, 5, 12
SHAPES = {"gate.a": (35,), "qkv.weight": (30, 10), "out.weight": (10, 30), "filter": (4, 5, 6)}


def range_of(name: str, shape: tuple[int, ...], first: int, count: int, start: int) -> list[TensorSlice]:
    found = []
    for region in regions_of_range(shape, first, count):
        found.append(TensorSlice(name, shape, region, start))
        start += region.numel
    return found


def share(blocks: range, index: int, count: int) -> list[TensorSlice]:
    """Slices that rank `index` of `count` ZeRO ranks holds of some blocks."""
    held: list[TensorSlice] = []
    for block in blocks:
        for leaf, shape in SHAPES.items():
            total = torch.Size(shape).numel()
            size = -(-total // count)
            first = min(index * size, total)
            start = sum(item.region.numel for item in held)
            held += range_of(f"blocks.{block}.{leaf}", shape, first, min(size, total - first), start)
    return held


class Written(NamedTuple):
    folder: Location
    records: list[FileRecord]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A checkpoint of 4 stages x 5 ranks in which every element is its position in the logical tensor."""
    directory = CheckpointDirectory(Location(tmp_path_factory.mktemp("checkpoint")))
    directory.begin(1)
    files = []
    for stage in range(STAGES):
        for index in range(SHARES):
            held = share(range(3 * stage, 3 * stage + 3), index, SHARES)
            values = torch.cat([torch.empty(0), *(positions(s.shape)[selection(s.region)].flatten() for s in held)])
            files += write_tensors(
                directory.folder(1), stage * SHARES + index, SliceTable.of(held), {"weights": values}
            )
    directory.commit(1, {"step": 1}, files)
    return Written(directory.folder(1), files)


def positions(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def selection(region: Region) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(region.offset, region.extent, strict=True))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_every_rank_reads_its_slices_from_few_files(
    checkpoint: Written, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    read_range = Location.read_range
    monkeypatch.setattr(Location, "read_range", lambda self, *a: opened.append(self.name) or read_range(self, *a))
    for index in range(count):
        needed = share(range(2, 5), index, count)  # of two stages
        opened.clear()
        table = SliceTable.of(needed)
        reader = TensorReader(checkpoint.folder, checkpoint.records, table, ReadOptions(unfiltered_indices=0))
        indices = {name for name in opened if name.startswith("rank_") and name.endswith(INDEX)}
        size = sum(item.region.numel for item in needed)
        found = reader.fill(table, "weights", torch.full((size,), -1.0))
        for item in needed:
            expected = positions(item.shape)[selection(item.region)].flatten()
            assert torch.equal(found[item.start : item.start + item.region.numel], expected), item
        assert 0 < len(indices) <= 2 * (SHARES if count == 1 else 4), indices


def test_bounds_contain_their_slices() -> None:
    held = [
        *range_of("blocks.9.w", (8, 10), 20, 40, 0),
        *range_of("blocks.10.w", (8, 10), 20, 40, 40),
        TensorSlice("blocks.10.scalar", (), Region((), ()), 80),
    ]
    bounds = coverage_bounds(SliceTable.of(held))
    assert bounds == (
        CoverageBounds(first="blocks.10.scalar", last="blocks.10.scalar", low=0, high=1),
        CoverageBounds(first="blocks.9.w", last="blocks.10.w", low=0.25, high=0.75),
    )

    def may_overlap(needed: list[TensorSlice]) -> bool:
        return CoverageQuery(SliceTable.of(needed)).may_overlap(bounds)

    assert may_overlap(range_of("blocks.9.w", (8, 10), 59, 1, 0))
    assert not may_overlap(range_of("blocks.9.w", (8, 10), 61, 19, 0))
    assert not may_overlap(range_of("blocks.8.w", (8, 10), 0, 80, 0))
    assert not may_overlap(range_of("blocks.11.w", (8, 10), 0, 80, 0))
    assert not may_overlap([]) and not CoverageQuery(SliceTable.of(held)).may_overlap(())
    columns = TensorSlice("blocks.9.w", (8, 10), Region((0, 8), (2, 1)), 0)  # of rows 0 and 1: up to element 18
    assert not may_overlap([columns])


def test_numbers_in_names_are_ordered_by_value() -> None:
    names = ["head", "blocks.10.b", "blocks.b", "blocks.2.a", "blocks.10.a"]
    assert sorted(names, key=name_order) == ["blocks.2.a", "blocks.10.a", "blocks.10.b", "blocks.b", "head"]


def test_missing_tensor_is_reported(checkpoint: Written) -> None:
    with pytest.raises(CheckpointError, match=r"has no tensor blocks\.12\.w"):
        table = SliceTable.of(range_of("blocks.12.w", (2, 2), 0, 4, 0))
        open_checkpoint(checkpoint.folder, table).reader.fill(table, "weights", torch.zeros(4))


def test_fractions_beyond_1_are_refused() -> None:
    with pytest.raises(ValueError, match="less than or equal to 1"):
        CoverageBounds(first="a", last="b", low=0, high=1.5)


def test_long_names_are_refused() -> None:
    for first, last in (("9" * 5000, "9"), ("9", "9" * 5000)):
        with pytest.raises(ValueError, match="at most 1024 characters"):
            CoverageBounds(first=first, last=last, low=0, high=1)
