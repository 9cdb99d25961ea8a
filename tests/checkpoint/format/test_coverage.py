"""Which files a reader has to open: all that hold something it wants, and few others."""

import pytest
import torch

from rdm_scale.checkpoint.directory import CheckpointDirectory, open_checkpoint
from rdm_scale.checkpoint.format import reader as tensors
from rdm_scale.checkpoint.format.coverage import Span, Wanted, name_order, spans_of
from rdm_scale.checkpoint.format.index import INDEX
from rdm_scale.checkpoint.format.overlap import Rectangle, rectangles_of_range
from rdm_scale.checkpoint.format.slices import Piece, Pieces
from rdm_scale.checkpoint.format.writer import write_tensors
from rdm_scale.errors import CheckpointError
from rdm_scale.storage.location import Location

STAGES, SHARES, BLOCKS = 4, 5, 12
SHAPES = {"gate.a": (35,), "qkv.weight": (30, 10), "out.weight": (10, 30), "filter": (4, 5, 6)}


def range_of(name: str, shape: tuple[int, ...], first: int, count: int, start: int) -> list[Piece]:
    pieces = []
    for rectangle in rectangles_of_range(shape, first, count):
        pieces.append(Piece(name, shape, rectangle, start))
        start += rectangle.numel
    return pieces


def share(blocks: range, index: int, count: int) -> list[Piece]:
    """What one of `count` ZeRO ranks holds of some blocks."""
    pieces: list[Piece] = []
    for block in blocks:
        for leaf, shape in SHAPES.items():
            total = torch.Size(shape).numel()
            size = -(-total // count)
            first = min(index * size, total)
            start = sum(piece.rectangle.numel for piece in pieces)
            pieces += range_of(f"blocks.{block}.{leaf}", shape, first, min(size, total - first), start)
    return pieces


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Location:
    """A checkpoint of 4 stages x 5 ranks in which every element is its position in the whole tensor."""
    directory = CheckpointDirectory(Location(tmp_path_factory.mktemp("checkpoint")))
    directory.begin(1)
    files = []
    for stage in range(STAGES):
        for index in range(SHARES):
            pieces = share(range(3 * stage, 3 * stage + 3), index, SHARES)
            values = torch.cat([torch.empty(0), *(whole(p.shape)[slices(p.rectangle)].flatten() for p in pieces)])
            files += write_tensors(directory.folder(1), stage * SHARES + index, Pieces.of(pieces), {"weights": values})
    directory.commit(1, {"step": 1}, files)
    return directory.folder(1)


def whole(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def slices(box: Rectangle) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(box.offset, box.extent, strict=True))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_any_share_is_read_whole_and_from_few_files(
    folder: Location, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(tensors, "_FEW_INDICES", 0)
    read_range = Location.read_range
    monkeypatch.setattr(Location, "read_range", lambda self, *a: opened.append(self.name) or read_range(self, *a))
    for index in range(count):
        pieces = share(range(2, 5), index, count)  # of two stages
        opened.clear()
        wanted = Pieces.of(pieces)
        _, reader = open_checkpoint(folder, wanted)
        indices = {name for name in opened if name.startswith("rank_") and name.endswith(INDEX)}
        size = sum(piece.rectangle.numel for piece in pieces)
        found = reader.fill(wanted, "weights", torch.full((size,), -1.0))
        for piece in pieces:
            box = piece.rectangle
            expected = whole(piece.shape)[slices(box)].flatten()
            assert torch.equal(found[piece.start : piece.start + box.numel], expected), piece
        assert len(indices) <= 2 * (SHARES if count == 1 else 4), indices


def test_spans_bound_their_pieces() -> None:
    pieces = [
        *range_of("blocks.9.w", (8, 10), 20, 40, 0),
        *range_of("blocks.10.w", (8, 10), 20, 40, 40),
        Piece("blocks.10.scalar", (), Rectangle((), ()), 80),
    ]
    spans = spans_of(Pieces.of(pieces))
    assert spans == (
        Span(first="blocks.10.scalar", last="blocks.10.scalar", low=0, high=1),
        Span(first="blocks.9.w", last="blocks.10.w", low=0.25, high=0.75),
    )

    def meets(pieces: list[Piece]) -> bool:
        return Wanted(Pieces.of(pieces)).meets(spans)

    assert meets(range_of("blocks.9.w", (8, 10), 59, 1, 0))
    assert not meets(range_of("blocks.9.w", (8, 10), 61, 19, 0))
    assert not meets(range_of("blocks.8.w", (8, 10), 0, 80, 0))
    assert not meets(range_of("blocks.11.w", (8, 10), 0, 80, 0))
    assert not meets([]) and not Wanted(Pieces.of(pieces)).meets(())
    columns = Piece("blocks.9.w", (8, 10), Rectangle((0, 8), (2, 1)), 0)  # of rows 0 and 1: up to element 18
    assert not meets([columns])


def test_numbers_in_names_count() -> None:
    names = ["head", "blocks.10.b", "blocks.b", "blocks.2.a", "blocks.10.a"]
    assert sorted(names, key=name_order) == ["blocks.2.a", "blocks.10.a", "blocks.10.b", "blocks.b", "head"]


def test_a_tensor_that_no_file_claims_is_missing(folder: Location) -> None:
    with pytest.raises(CheckpointError, match=r"has no tensor blocks\.12\.w"):
        piece = Pieces.of(range_of("blocks.12.w", (2, 2), 0, 4, 0))
        open_checkpoint(folder, piece)[1].fill(piece, "weights", torch.zeros(4))


def test_spans_are_checked() -> None:
    with pytest.raises(ValueError, match="less than or equal to 1"):
        Span(first="a", last="b", low=0, high=1.5)


def test_names_that_would_take_long_to_order_are_refused() -> None:
    for first, last in (("9" * 5000, "9"), ("9", "9" * 5000)):
        with pytest.raises(ValueError, match="at most 1024 characters"):
            Span(first=first, last=last, low=0, high=1)
