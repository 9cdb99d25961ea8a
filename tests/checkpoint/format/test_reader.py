"""Tensors written by some ranks and read by others: equal bit for bit, or refused with a reason."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from rdm_scale.checkpoint.format import index, range_reader, writer
from rdm_scale.checkpoint.format.overlap import Rectangle
from rdm_scale.checkpoint.format.reader import TensorReader
from rdm_scale.checkpoint.format.slices import Piece, Pieces
from rdm_scale.checkpoint.format.writer import write_tensors
from rdm_scale.errors import CheckpointError
from rdm_scale.storage.location import Location
from tests.support.tensor_layouts import FIELDS, LAYOUTS, PADDING, SHAPES, cut, flat, write


@pytest.fixture(params=["blocks as in production", "many small blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks make small files consist of many, and of several range reads."""
    if request.param == "many small blocks":
        for module in (index, range_reader, writer):
            monkeypatch.setattr(module, "BLOCK_BYTES", 64)
        monkeypatch.setattr(range_reader, "_FAR_BYTES", 128)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("writers", LAYOUTS)
def test_any_layout_reads_what_any_other_wrote(writers: str) -> None:
    folder = Location(f"memory://any/{writers}")
    reader = TensorReader(folder, write(folder, LAYOUTS[writers]))
    assert reader.fields() == list(FIELDS)
    assert {name: reader.shape(name) for name in reader.names()} == SHAPES
    for pieces in itertools.chain.from_iterable(LAYOUTS.values()):
        for field, values in FIELDS.items():
            expected = flat(pieces, values)
            assert torch.equal(reader.fill(Pieces.of(pieces), field, torch.full_like(expected, PADDING)), expected)
    for name, tensor in FIELDS["ema"].items():
        assert torch.equal(reader.read("ema", name), tensor)
    whole = reader.read_many("weights", reader.names())
    assert all(torch.equal(whole[name], tensor) for name, tensor in FIELDS["weights"].items())
    box = Rectangle((1, 0, 1, 1), (2, 3, 1, 2))
    assert torch.equal(reader.read("exp_avg", "patch.weight", box), cut(FIELDS["exp_avg"]["patch.weight"], box))


def test_files_are_safetensors_without_padding(tmp_path: Path) -> None:
    pieces = LAYOUTS["dp3"][1]
    records = write_tensors(Location(tmp_path), 4, Pieces.of(pieces), {"ema": flat(pieces, FIELDS["ema"])})
    assert [(record.name, record.bytes) for record in records] == [
        (name, (tmp_path / name).stat().st_size) for name in ("rank_00004.safetensors", "rank_00004.index.safetensors")
    ]
    with safe_open(tmp_path / "rank_00004.safetensors", "pt") as file:
        expected = torch.cat([cut(FIELDS["ema"][p.name], p.rectangle).flatten() for p in pieces])
        assert torch.equal(file.get_tensor("ema"), expected)
    with safe_open(tmp_path / "rank_00004.index.safetensors", "np") as file:
        assert bytes(file.get_tensor("names")).decode().split("\n") == list(dict.fromkeys(p.name for p in pieces))
        numbers, *sides = file.get_tensor("pieces").tolist()
        assert numbers == [list(dict.fromkeys(p.name for p in pieces)).index(p.name) for p in pieces]
        for i, piece in enumerate(pieces):
            box, column = piece.rectangle, [side[i] for side in sides]
            missing = 4 - len(piece.shape)
            assert column == [*box.offset, *(0,) * missing, *box.extent, *(1,) * missing]


def test_a_rank_may_have_nothing_to_write(tmp_path: Path) -> None:
    folder = Location(tmp_path)
    records = write(folder, [*LAYOUTS["1"], []])
    assert torch.equal(TensorReader(folder, records).read("ema", "bias"), FIELDS["ema"]["bias"])


def test_tensors_asked_for_in_another_order(tmp_path: Path) -> None:
    reader = TensorReader(Location(tmp_path), write(Location(tmp_path), LAYOUTS["1"]))
    found = reader.read_many("ema", list(reversed(SHAPES)))
    assert all(torch.equal(found[name], FIELDS["ema"][name]) for name in SHAPES)


def test_equal_layouts_read_each_field_in_one_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Location("memory://sweep")
    count, shape = 4000, (30, 25)
    pieces = [Piece(f"block.{i}", shape, Rectangle((0, 0), shape), 750 * i) for i in range(count)]
    whole, ends = Pieces.of(pieces), Pieces.of([pieces[0], pieces[-1]])
    values = torch.randn(750 * count)
    reader = TensorReader(folder, write_tensors(folder, 0, whole, {"ema": values, "weights": values + 1}))
    ranges: list[tuple[int, int]] = []
    read_into = Location.read_into

    def spy(self: Location, offset: int, buffer: memoryview) -> int:
        ranges.append((offset, len(buffer)))
        return read_into(self, offset, buffer)

    monkeypatch.setattr(Location, "read_into", spy)
    assert torch.equal(reader.fill(whole, "weights", torch.zeros(750 * count)), values + 1)
    ema, total = reader.files[0].header_bytes, 4 * 750 * count
    assert ranges == [(ema + total, total)]  # 12 MB, nothing else
    ranges.clear()
    size = index.BLOCK_BYTES
    reader.read("ema", "block.7")
    assert ranges == [(ema, size)]
    ranges.clear()
    reader.fill(ends, "ema", torch.zeros(750 * count))
    assert sorted(ranges) == [(ema, size), (ema + 2 * size, total - 2 * size)]  # what lies between is not read


def test_every_flipped_byte_is_found_and_named(tmp_path: Path) -> None:
    records = write(Location(tmp_path), LAYOUTS["dp2"])

    def read_all() -> None:
        reader = TensorReader(Location(tmp_path), records)
        for field in FIELDS:
            reader.read_many(field, reader.names())

    read_all()
    header = TensorReader(Location(tmp_path), records).files[0].header_bytes
    for record in records:
        path = tmp_path / record.name
        content = path.read_bytes()
        unused = 0 if record.xxh3 else header  # for others: see inspection.verify
        for position in range(unused, len(content), 37):
            path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
            with pytest.raises(CheckpointError, match=rf"{record.name} is damaged"):
                read_all()
        path.write_bytes(content)
    read_all()


def test_a_flipped_byte_is_located_to_its_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (index, range_reader, writer):
        monkeypatch.setattr(module, "BLOCK_BYTES", 64)
    records = write(Location(tmp_path), LAYOUTS["1"])
    reader = TensorReader(Location(tmp_path), records)
    content = bytearray((tmp_path / records[0].name).read_bytes())
    position = len(content) - 100
    content[position] ^= 1
    (tmp_path / records[0].name).write_bytes(content)
    ema = len(content) - 4 * sum(map(math.prod, SHAPES.values()))  # the last field
    begin = ema + (position - ema) // 64 * 64
    with pytest.raises(CheckpointError, match=f"bytes {begin:,} to {begin + 64:,} are not what was written"):
        reader.read_many("ema", reader.names())
    reader.read_many("weights", reader.names())  # other blocks are still good


@pytest.mark.parametrize(
    ("lost", "reason"), [("rank_00001.safetensors", "is truncated"), ("rank_00001.index.safetensors", "is damaged")]
)
def test_lost_bytes_are_reported(tmp_path: Path, lost: str, reason: str) -> None:
    records = write(Location(tmp_path), LAYOUTS["dp2"])
    content = (tmp_path / lost).read_bytes()
    (tmp_path / lost).write_bytes(content[:-9])
    with pytest.raises(CheckpointError, match=f"{lost} {reason}"):
        TensorReader(Location(tmp_path), records).read("ema", "bias")
    (tmp_path / lost).unlink()
    with pytest.raises(CheckpointError, match=f"cannot read .*{lost}: No such file"):
        TensorReader(Location(tmp_path), records).read("ema", "bias")


def test_holes_and_strangers_are_named() -> None:
    folder = Location("memory://holes")
    records = write(folder, LAYOUTS["dp3"])
    reader = TensorReader(folder, [record for record in records if "00001" not in record.name])
    with pytest.raises(CheckpointError, match=r"has a hole: of bias \[13\] the 13 elements .* 8 of them"):
        reader.read("ema", "bias")
    with pytest.raises(CheckpointError, match=r"has a hole: of qkv.weight \[12, 7\]"):
        reader.fill(Pieces.of([Piece("qkv.weight", (12, 7), Rectangle((3, 0), (3, 7)), 0)]), "ema", torch.zeros(21))
    with pytest.raises(CheckpointError, match="has no tensor gate"):
        reader.fill(Pieces.of([Piece("gate", (3,), Rectangle((0,), (3,)), 0)]), "ema", torch.zeros(3))
    with pytest.raises(CheckpointError, match=r"bias is \[13\] in .*, but \[14\] here"):
        reader.fill(Pieces.of([Piece("bias", (14,), Rectangle((0,), (14,)), 0)]), "ema", torch.zeros(14))
    with pytest.raises(CheckpointError, match="has no momentum; it has weights, exp_avg, exp_avg_sq, ema"):
        reader.read("momentum", "scale")
    with pytest.raises(CheckpointError, match="no index"):
        TensorReader(folder, [])


def test_a_rectangle_beyond_its_tensor_takes_nothing_from_the_next() -> None:
    folder = Location("memory://beyond")
    reader = TensorReader(folder, write(folder, LAYOUTS["1"]))
    with pytest.raises(CheckpointError, match=r"of bias \[13\] the 5 elements from \[10\] on are needed, 3 of them"):
        reader.read("ema", "bias", Rectangle((10,), (5,)))


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    (tmp_path / "rank_00000.safetensors").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"rank_00000.safetensors: No space left .*; it needs [\d,]+ bytes"):
        write(Location(tmp_path), LAYOUTS["1"])


@pytest.mark.parametrize(
    "wrong", [torch.zeros(5), torch.zeros(400, dtype=torch.float64), torch.zeros(400, 1)], ids=["short", "type", "2d"]
)
def test_fields_that_do_not_fit_are_refused_before_writing(tmp_path: Path, wrong: Tensor) -> None:
    with pytest.raises(ValueError, match="must be a flat fp32 CPU tensor"):
        write_tensors(Location(tmp_path), 0, Pieces.of(LAYOUTS["1"][0]), {"ema": wrong})
    assert not list(tmp_path.iterdir())


def test_ranges_that_overlap_are_refused() -> None:
    folder = Location("memory://overlap")
    pieces = LAYOUTS["tp2"]
    records = write(folder, [*pieces, [Piece("out.weight", (5, 8), Rectangle((4, 3), (1, 2)), 0)]])
    with pytest.raises(CheckpointError, match=r"two ranges of out.weight overlap in .*rank_00000.* and .*rank_00002"):
        TensorReader(folder, records)


def test_ranks_that_disagree_on_a_shape_are_refused() -> None:
    folder = Location("memory://shapes")
    box = Rectangle((0,), (2,))
    records = [
        record
        for rank, size in enumerate((4, 5))
        for record in write_tensors(folder, rank, Pieces.of([Piece("bias", (size,), box, 0)]), {"ema": torch.zeros(2)})
    ]
    with pytest.raises(CheckpointError, match=r"bias is \[5\] in .*rank_00001.*, but \[4\] in another file"):
        TensorReader(folder, records)
