"""Pieces as arrays, against pieces one by one."""

import numpy as np
import torch

from rdm_scale.checkpoint.format.overlap import Rectangle, padded
from rdm_scale.checkpoint.format.slices import Piece, Pieces, shape_of
from rdm_scale.checkpoint.sharded_state import pieces_of
from rdm_scale.models.layers import WHOLE, Slice
from rdm_scale.parallel.zero.engine import Shard

LIST = [
    Piece("b", (), Rectangle((), ()), 7),
    Piece("a", (4, 3, 2), Rectangle((1, 0, 1), (2, 3, 1)), 20),
    Piece("b", (), Rectangle((), ()), 30),
]


def listed(pieces: Pieces) -> list[Piece]:
    boxes = pieces.boxes
    columns = zip(boxes.tensor, boxes.offset.T.tolist(), boxes.extent.T.tolist(), boxes.start.tolist(), strict=True)
    found = []
    for tensor, offset, extent, start in columns:
        shape = shape_of(pieces.shapes, tensor)
        n = len(shape)
        assert offset[n:] == [0] * (len(offset) - n) and extent[n:] == [1] * (len(extent) - n)
        found.append(Piece(pieces.names[tensor], shape, Rectangle(tuple(offset[:n]), tuple(extent[:n])), start))
    return found


def test_a_list_and_back() -> None:
    pieces = Pieces.of(LIST)
    assert listed(pieces) == LIST
    assert pieces.names == ["b", "a"]
    assert pieces.ends.tolist() == [8, 26, 31]
    assert listed(Pieces.of([])) == [] and Pieces.of([]).names == []


def test_whole_tensors_lie_one_after_the_other() -> None:
    pieces = Pieces.whole(["x", "y", "z"], padded([(2, 3), (), (5,)], 2))
    assert listed(pieces) == [
        Piece("x", (2, 3), Rectangle((0, 0), (2, 3)), 0),
        Piece("y", (), Rectangle((), ()), 6),
        Piece("z", (5,), Rectangle((0,), (5,)), 7),
    ]


def test_a_rank_s_ranges_hold_the_elements_that_its_buffer_has() -> None:
    """Of parameters of several dimensions, whole or cut; every element is its place in the logical tensor."""
    kinds = [((6, 4), WHOLE), ((3, 4), Slice(0, 1, 2)), ((6, 2), Slice(1, 1, 2)), ((5,), Slice(0, 2, 3)), ((), WHOLE),
             ((2, 3, 2, 2), Slice(1, 0, 2))]  # fmt: skip
    logical, shards, start = {}, [], 3
    buffer = torch.full((200,), -1.0)
    for i, (shape, part) in enumerate(kinds):
        name, whole = f"t{i}", part.whole(shape)
        logical[name] = torch.arange(torch.Size(whole).numel(), dtype=torch.float32).view(whole)
        size = torch.Size(shape).numel()
        first, count = (1, size - 2) if size > 2 else (0, size)
        mine = logical[name] if part is WHOLE else part.of(logical[name])
        buffer[start : start + count] = mine.flatten()[first : first + count]
        shards.append(Shard(name, shape, first, count, start, part))
        start += count + 2
    shards.append(Shard("elsewhere", (4, 4), 16, 0, start, WHOLE))
    pieces = pieces_of(shards)
    assert pieces.names == list(logical)
    seen = np.zeros(200, bool)
    for piece in listed(pieces):
        box = piece.rectangle
        assert piece.shape == tuple(logical[piece.name].shape)
        expected = logical[piece.name][tuple(slice(o, o + n) for o, n in zip(box.offset, box.extent, strict=True))]
        place = slice(piece.start, piece.start + box.numel)
        assert torch.equal(buffer[place], expected.flatten())
        seen[place] = True
    assert seen.tolist() == (buffer >= 0).tolist()


def test_a_rank_without_a_share_has_no_pieces() -> None:
    assert listed(pieces_of([])) == [] == listed(pieces_of([Shard("a", (3,), 3, 0, 0, WHOLE)]))
