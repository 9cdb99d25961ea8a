"""Rectangles against index arithmetic on whole arrays."""

import math
import random

import numpy as np
import pytest

from rdm_scale.checkpoint.format.overlap import (
    Atlas,
    Boxes,
    Rectangle,
    boxes_of_ranges,
    copies_between,
    padded,
    rectangles_of_range,
)
from rdm_scale.checkpoint.format.slices import Piece
from rdm_scale.errors import CheckpointError


def indices(shape: tuple[int, ...], box: Rectangle) -> np.ndarray:
    """Flat indices of the box's elements, row by row."""
    cut = tuple(slice(o, o + n) for o, n in zip(box.offset, box.extent, strict=True))
    return np.arange(math.prod(shape)).reshape(shape)[cut].reshape(-1)


def random_box(rng: random.Random, shape: tuple[int, ...]) -> Rectangle:
    offset = tuple(rng.randrange(n) for n in shape)
    return Rectangle(offset, tuple(rng.randint(1, n - o) for n, o in zip(shape, offset, strict=True)))


def random_shape(rng: random.Random, dimensions: int) -> tuple[int, ...]:
    return tuple(rng.randint(1, 5) for _ in range(dimensions))


@pytest.mark.parametrize("dimensions", [0, 1, 2, 3, 4])
def test_a_range_is_its_rectangles_in_flat_order(dimensions: int) -> None:
    rng = random.Random(dimensions)
    for _ in range(300):
        shape = random_shape(rng, dimensions)
        size = math.prod(shape)
        first = rng.randint(0, size)
        count = rng.randint(0, size - first)
        boxes = rectangles_of_range(shape, first, count)
        position = first
        for box in boxes:  # each is one contiguous part, right after the one before
            assert indices(shape, box).tolist() == list(range(position, position + box.numel))
            position += box.numel
        assert position == first + count
        assert len(boxes) <= max(1, 2 * dimensions - 1)


def test_a_range_of_a_matrix_is_at_most_three_rectangles() -> None:
    assert rectangles_of_range((5, 4), 3, 14) == [
        Rectangle((0, 3), (1, 1)),
        Rectangle((1, 0), (3, 4)),
        Rectangle((4, 0), (1, 1)),
    ]
    assert rectangles_of_range((5, 4), 0, 20) == [Rectangle((0, 0), (5, 4))]
    assert rectangles_of_range((5, 4), 5, 2) == [Rectangle((1, 1), (1, 2))]
    assert rectangles_of_range((), 0, 1) == [Rectangle((), ())]
    assert rectangles_of_range((7,), 7, 0) == []


@pytest.mark.parametrize(("first", "count"), [(0, 21), (-1, 2), (20, 1), (3, -1)])
def test_a_range_outside_of_the_tensor_is_refused(first: int, count: int) -> None:
    with pytest.raises(ValueError, match="not all in a tensor"):
        rectangles_of_range((5, 4), first, count)


def test_many_ranges_at_once_are_those_of_each() -> None:
    """Also where the shapes are of unlike dimensions, some ranges are empty, and places in the buffer are apart."""
    rng = random.Random(5)
    shapes = [random_shape(rng, rng.randint(0, 4)) for _ in range(200)]
    first = [rng.randint(0, math.prod(shape)) for shape in shapes]
    count = [rng.randint(0, math.prod(shape) - begin) for shape, begin in zip(shapes, first, strict=True)]
    start = [rng.randint(0, 1000) for _ in shapes]
    found = boxes_of_ranges(padded(shapes, 4, 1), *(np.array(column) for column in (first, count, start)))
    expected = []
    for i, shape in enumerate(shapes):
        position = start[i]
        for box in rectangles_of_range(shape, first[i], count[i]):
            missing = 4 - len(shape)
            expected.append((i, (*box.offset, *(0,) * missing), (*box.extent, *(1,) * missing), position))
            position += box.numel
    columns = zip(found.tensor, found.offset.T, found.extent.T, found.start, strict=True)
    assert [(i, tuple(offset), tuple(extent), place) for i, offset, extent, place in columns] == expected


def meets(shape: tuple[int, ...], a: Rectangle, b: Rectangle) -> bool:
    return bool(set(indices(shape, a)) & set(indices(shape, b)))


def boxes_of(pieces: list[Piece], numbers: dict[str, int], dimensions: int) -> Boxes:
    boxes = [piece.rectangle for piece in pieces]
    return Boxes(
        np.array([numbers[piece.name] for piece in pieces], np.int64),
        padded([box.offset for box in boxes], dimensions),
        padded([box.extent for box in boxes], dimensions, 1),
        np.array([piece.start for piece in pieces], np.int64),
    )


def random_world(rng: random.Random, count: int, shapes: dict[str, tuple[int, ...]]) -> list[Piece]:
    pieces, start = [], 0
    for _ in range(count):
        name = rng.choice(list(shapes))
        box = random_box(rng, shapes[name])
        pieces.append(Piece(name, shapes[name], box, start))
        start += box.numel + rng.choice([0, 0, 3])
    return pieces


def test_bulk_search_finds_what_pairwise_overlap_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rdm_scale.checkpoint.format.overlap._PAIRS", 50)  # several parts
    rng = random.Random(0)
    disjoint = 0
    for trial in range(20):
        shapes = {name: random_shape(rng, rng.randint(0, 4)) for name in "abcde"}
        numbers = {name: i for i, name in enumerate(shapes)}
        ours, theirs = random_world(rng, 30 if trial % 2 else 2, shapes), random_world(rng, 40, shapes)
        atlas = Atlas(boxes_of(ours, numbers, 4), padded(list(shapes.values()), 4, 1))
        found = [pair for a, b in atlas.meeting(boxes_of(theirs, numbers, 4)) for pair in zip(a, b, strict=True)]
        expected = {
            (i, j)
            for i, p in enumerate(theirs)
            for j, q in enumerate(ours)
            if p.name == q.name and meets(shapes[p.name], p.rectangle, q.rectangle)
        }
        assert len(found) == len(expected)
        assert set(found) == expected
        among = {pair for a, b in atlas.meeting(boxes_of(ours, numbers, 4)) for pair in zip(a, b, strict=True)}
        assert not atlas.is_disjoint or all(i == j for i, j in among)
        disjoint += atlas.is_disjoint
    assert 0 < disjoint < 20, "both must occur"


def test_rectangles_that_could_all_meet_are_refused() -> None:
    """Columns of one long tensor: none meets another, but all their spans overlap."""
    columns = 5000
    boxes = Boxes(
        np.zeros(columns, np.int64), np.array([[0] * columns, range(columns)]), np.array([[2], [1]]).repeat(columns, 1),
        np.arange(columns) * 2,
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="pairs of ranges may overlap"):
        list(Atlas(boxes, np.array([[2], [columns]])).meeting(boxes))


def test_spans_that_touch_are_disjoint() -> None:
    def is_disjoint(second: int) -> bool:
        boxes = [Piece("t", (9,), Rectangle((second,), (4,)), 0), Piece("t", (9,), Rectangle((0,), (5,)), 4)]
        return Atlas(boxes_of(boxes, {"t": 0}, 1), np.array([[9]])).is_disjoint

    assert is_disjoint(5) and not is_disjoint(4) and not is_disjoint(0)
    assert Atlas(boxes_of([], {}, 1), np.empty((1, 0), np.int64)).is_disjoint


def test_copies_say_where_each_element_goes() -> None:
    """Every element holds its own index, so a wrong stride, start or join shows."""
    rng = random.Random(1)
    for _ in range(200):
        shape = random_shape(rng, 3)
        a, b = random_box(rng, shape), random_box(rng, shape)
        if not meets(shape, a, b):
            continue
        pair = [boxes_of([Piece("t", shape, box, start)], {"t": 0}, 3) for box, start in ((a, 2), (b, 5))]
        plan = copies_between(*pair)
        source, target = np.full(130, -1), np.full(130, -1)
        source[2 : 2 + a.numel] = indices(shape, a)
        for i in range(len(plan.source)):
            view = np.lib.stride_tricks.as_strided
            out = view(target[plan.target[i] :], plan.extent[:, i], 8 * plan.target_strides[:, i])
            out[...] = view(source[plan.source[i] :], plan.extent[:, i], 8 * plan.source_strides[:, i])
        expected = np.full(130, -1)
        wanted = indices(shape, b)
        expected[5 : 5 + b.numel] = np.where(np.isin(wanted, indices(shape, a)), wanted, -1)
        assert target.tolist() == expected.tolist()


def test_equal_layouts_need_one_copy() -> None:
    pieces, start = [], 0
    for i in range(100):
        for box in rectangles_of_range((6, 5), 7, 20):
            pieces.append(Piece(str(i), (6, 5), box, start))
            start += box.numel
    boxes = boxes_of(pieces, {str(i): i for i in range(100)}, 2)
    plan = copies_between(boxes, boxes)
    assert (plan.source.tolist(), plan.target.tolist(), plan.span.tolist()) == ([0], [0], [2000])
    assert plan.contiguous.all()
