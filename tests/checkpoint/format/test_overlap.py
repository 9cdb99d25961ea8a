"""Overlap queries and copies, compared with index arithmetic on complete arrays."""

import math
import random

import numpy as np
import pytest

from rdm_scale.checkpoint.format.overlap import SliceIndex, plan_copies
from rdm_scale.checkpoint.format.slices import (
    Region,
    Slices,
    TensorSlice,
    pad_rows,
    regions_of_range,
    slices_of_ranges,
)
from rdm_scale.errors import CheckpointError


def indices(shape: tuple[int, ...], region: Region) -> np.ndarray:
    """Flat indices of the region's elements in row-major order."""
    selection = tuple(slice(o, o + n) for o, n in zip(region.offset, region.extent, strict=True))
    return np.arange(math.prod(shape)).reshape(shape)[selection].reshape(-1)


def random_region(rng: random.Random, shape: tuple[int, ...]) -> Region:
    offset = tuple(rng.randrange(n) for n in shape)
    return Region(offset, tuple(rng.randint(1, n - o) for n, o in zip(shape, offset, strict=True)))


def random_shape(rng: random.Random, dimensions: int) -> tuple[int, ...]:
    return tuple(rng.randint(1, 5) for _ in range(dimensions))


@pytest.mark.parametrize("dimensions", [0, 1, 2, 3, 4])
def test_a_range_is_split_into_regions_in_flat_order(dimensions: int) -> None:
    rng = random.Random(dimensions)
    for _ in range(300):
        shape = random_shape(rng, dimensions)
        size = math.prod(shape)
        first = rng.randint(0, size)
        count = rng.randint(0, size - first)
        regions = regions_of_range(shape, first, count)
        position = first
        for region in regions:  # each is contiguous and directly follows the one before
            assert indices(shape, region).tolist() == list(range(position, position + region.numel))
            position += region.numel
        assert position == first + count
        assert len(regions) <= max(1, 2 * dimensions - 1)


def test_a_range_of_a_matrix_is_at_most_three_regions() -> None:
    assert regions_of_range((5, 4), 3, 14) == [
        Region((0, 3), (1, 1)),
        Region((1, 0), (3, 4)),
        Region((4, 0), (1, 1)),
    ]
    assert regions_of_range((5, 4), 0, 20) == [Region((0, 0), (5, 4))]
    assert regions_of_range((5, 4), 5, 2) == [Region((1, 1), (1, 2))]
    assert regions_of_range((), 0, 1) == [Region((), ())]
    assert regions_of_range((7,), 7, 0) == []


@pytest.mark.parametrize(("first", "count"), [(0, 21), (-1, 2), (20, 1), (3, -1)])
def test_a_range_outside_the_tensor_is_refused(first: int, count: int) -> None:
    with pytest.raises(ValueError, match="not all in a tensor"):
        regions_of_range((5, 4), first, count)


def test_many_ranges_give_the_same_slices_as_each_alone() -> None:
    """With shapes of different dimensions, empty ranges, and gaps in the buffer."""
    rng = random.Random(5)
    shapes = [random_shape(rng, rng.randint(0, 4)) for _ in range(200)]
    first = [rng.randint(0, math.prod(shape)) for shape in shapes]
    count = [rng.randint(0, math.prod(shape) - begin) for shape, begin in zip(shapes, first, strict=True)]
    start = [rng.randint(0, 1000) for _ in shapes]
    found = slices_of_ranges(pad_rows(shapes, 4, 1), *(np.array(column) for column in (first, count, start)))
    expected = []
    for i, shape in enumerate(shapes):
        position = start[i]
        for region in regions_of_range(shape, first[i], count[i]):
            missing = 4 - len(shape)
            expected.append((i, (*region.offset, *(0,) * missing), (*region.extent, *(1,) * missing), position))
            position += region.numel
    columns = zip(found.tensor, found.offset.T, found.extent.T, found.start, strict=True)
    assert [(i, tuple(offset), tuple(extent), place) for i, offset, extent, place in columns] == expected


def overlap(shape: tuple[int, ...], a: Region, b: Region) -> bool:
    return bool(set(indices(shape, a)) & set(indices(shape, b)))


def arrays(slices: list[TensorSlice], numbers: dict[str, int], dimensions: int) -> Slices:
    return Slices(
        np.array([numbers[item.name] for item in slices], np.int64),
        pad_rows([item.region.offset for item in slices], dimensions),
        pad_rows([item.region.extent for item in slices], dimensions, 1),
        np.array([item.start for item in slices], np.int64),
    )


def random_slices(rng: random.Random, count: int, shapes: dict[str, tuple[int, ...]]) -> list[TensorSlice]:
    found, start = [], 0
    for _ in range(count):
        name = rng.choice(list(shapes))
        region = random_region(rng, shapes[name])
        found.append(TensorSlice(name, shapes[name], region, start))
        start += region.numel + rng.choice([0, 0, 3])
    return found


def test_index_finds_what_pairwise_comparison_finds() -> None:
    rng = random.Random(0)
    disjoint = 0
    for trial in range(20):
        shapes = {name: random_shape(rng, rng.randint(0, 4)) for name in "abcde"}
        numbers = {name: i for i, name in enumerate(shapes)}
        indexed, query = random_slices(rng, 30 if trial % 2 else 2, shapes), random_slices(rng, 40, shapes)
        index = SliceIndex(arrays(indexed, numbers, 4), pad_rows(list(shapes.values()), 4, 1))
        batches = list(index.overlapping(arrays(query, numbers, 4), pairs_at_once=50))
        found = [pair for batch in batches for pair in zip(*batch, strict=True)]
        expected = {
            (i, j)
            for i, p in enumerate(query)
            for j, q in enumerate(indexed)
            if p.name == q.name and overlap(shapes[p.name], p.region, q.region)
        }
        assert len(found) == len(expected)
        assert set(found) == expected
        batches = list(index.overlapping(arrays(indexed, numbers, 4), pairs_at_once=50))
        assert not index.is_disjoint or all((batch.query == batch.indexed).all() for batch in batches)
        disjoint += index.is_disjoint
    assert 0 < disjoint < 20, "both must occur"


def test_too_many_candidate_pairs_are_refused() -> None:
    """Columns of one tensor with two rows: no two overlap, but all their intervals do."""
    columns = 5000
    slices = Slices(
        np.zeros(columns, np.int64), np.array([[0] * columns, range(columns)]), np.array([[2], [1]]).repeat(columns, 1),
        np.arange(columns) * 2,
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="pairs of slices may overlap"):
        list(SliceIndex(slices, np.array([[2], [columns]])).overlapping(slices))


def test_intervals_that_touch_are_disjoint() -> None:
    def is_disjoint(second: int) -> bool:
        slices = [TensorSlice("t", (9,), Region((second,), (4,)), 0), TensorSlice("t", (9,), Region((0,), (5,)), 4)]
        return SliceIndex(arrays(slices, {"t": 0}, 1), np.array([[9]])).is_disjoint

    assert is_disjoint(5) and not is_disjoint(4) and not is_disjoint(0)
    assert SliceIndex(arrays([], {}, 1), np.empty((1, 0), np.int64)).is_disjoint


def test_copies_put_each_element_in_its_place() -> None:
    """Every element holds its own index, which reveals a wrong stride, start or merge."""
    rng = random.Random(1)
    for _ in range(200):
        shape = random_shape(rng, 3)
        a, b = random_region(rng, shape), random_region(rng, shape)
        if not overlap(shape, a, b):
            continue
        pair = [arrays([TensorSlice("t", shape, region, start)], {"t": 0}, 3) for region, start in ((a, 2), (b, 5))]
        plan = plan_copies(*pair)
        source, target = np.full(130, -1), np.full(130, -1)
        source[2 : 2 + a.numel] = indices(shape, a)
        for i in range(len(plan.source)):
            view = np.lib.stride_tricks.as_strided
            out = view(target[plan.target[i] :], plan.extent[:, i], 8 * plan.target_strides[:, i])
            out[...] = view(source[plan.source[i] :], plan.extent[:, i], 8 * plan.source_strides[:, i])
        expected = np.full(130, -1)
        needed = indices(shape, b)
        expected[5 : 5 + b.numel] = np.where(np.isin(needed, indices(shape, a)), needed, -1)
        assert target.tolist() == expected.tolist()


def test_equal_layouts_need_one_copy() -> None:
    held, start = [], 0
    for i in range(100):
        for region in regions_of_range((6, 5), 7, 20):
            held.append(TensorSlice(str(i), (6, 5), region, start))
            start += region.numel
    slices = arrays(held, {str(i): i for i in range(100)}, 2)
    plan = plan_copies(slices, slices)
    assert (plan.source.tolist(), plan.target.tolist(), plan.span.tolist()) == ([0], [0], [2000])
    assert plan.contiguous.all()
