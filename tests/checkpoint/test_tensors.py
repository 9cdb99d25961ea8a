"""Tensors written by some ranks and read by others: equal bit for bit, or refused with a reason."""

import itertools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from rdm_scale.checkpoint import index, reads, tensors
from rdm_scale.checkpoint.rectangles import Piece, Rectangle, rectangles_of_range
from rdm_scale.checkpoint.tensors import FileRecord, TensorReader, digest, write_tensors
from rdm_scale.data.storage import Location
from rdm_scale.errors import CheckpointError

SHAPES: dict[str, tuple[int, ...]] = {
    "scale": (),
    "bias": (13,),
    "qkv.weight": (12, 7),  # split by rows under tensor parallelism
    "out.weight": (5, 8),  # split by columns
    "patch.weight": (4, 3, 2, 3),
    "positions": (1, 6, 5),
}
ROWS, COLUMNS = {"qkv.weight"}, {"out.weight"}
PADDING = -7.0  # what must neither be written nor overwritten


def layout(tensor_size: int, data_size: int, uneven: bool = False) -> list[list[Piece]]:
    """Pieces of every rank: slices of some tensors, each flattened slice then cut into ZeRO-3 ranges with padding."""
    rng = random.Random(0)
    ranks = []
    for tensor_rank, data_rank in itertools.product(range(tensor_size), range(data_size)):
        pieces, start = [], rng.randint(0, 3)
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
            for box in rectangles_of_range(local, first, count):
                pieces.append(Piece(name, shape, box.shifted(offset), position))
                position += box.numel
            start += max(share, count) + rng.randint(0, 2)
        ranks.append(pieces)
    return ranks


def cut(tensor: Tensor, box: Rectangle) -> Tensor:
    return tensor[tuple(slice(o, o + n) for o, n in zip(box.offset, box.extent, strict=True))]


def flat(pieces: list[Piece], values: dict[str, Tensor]) -> Tensor:
    out = torch.full((max((p.start + p.rectangle.numel for p in pieces), default=0) + 2,), PADDING)
    for piece in pieces:
        out[piece.start : piece.start + piece.rectangle.numel] = cut(values[piece.name], piece.rectangle).flatten()
    return out


FIELDS = {
    field: {name: torch.randn(shape, generator=torch.Generator().manual_seed(i)) for name, shape in SHAPES.items()}
    for i, field in enumerate(("weights", "exp_avg", "exp_avg_sq", "ema"))
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


def write(folder: Location, ranks: list[list[Piece]]) -> list[FileRecord]:
    return [
        record
        for rank, pieces in enumerate(ranks)
        for record in write_tensors(folder, rank, pieces, {f: flat(pieces, values) for f, values in FIELDS.items()})
    ]


@pytest.fixture(params=["blocks as in production", "many small blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks make small files consist of many, and of several range reads."""
    if request.param == "many small blocks":
        for module in (index, reads, tensors):
            monkeypatch.setattr(module, "BLOCK_BYTES", 64)
        monkeypatch.setattr(reads, "_FAR_BYTES", 128)


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
            assert torch.equal(reader.fill(pieces, field, torch.full_like(expected, PADDING)), expected)
    for name, tensor in FIELDS["ema"].items():
        assert torch.equal(reader.read("ema", name), tensor)
    whole = reader.read_many("weights", reader.names())
    assert all(torch.equal(whole[name], tensor) for name, tensor in FIELDS["weights"].items())
    box = Rectangle((1, 0, 1, 1), (2, 3, 1, 2))
    assert torch.equal(reader.read("exp_avg", "patch.weight", box), cut(FIELDS["exp_avg"]["patch.weight"], box))


def test_files_are_safetensors_without_padding(tmp_path: Path) -> None:
    pieces = LAYOUTS["dp3"][1]
    records = write_tensors(Location(tmp_path), 4, pieces, {"ema": flat(pieces, FIELDS["ema"])})
    assert [(record.name, record.bytes) for record in records] == [
        (path.name, path.stat().st_size) for path in (tmp_path / "rank_00004.safetensors", tmp_path / "rank_00004.json")
    ]
    with safe_open(tmp_path / "rank_00004.safetensors", "pt") as file:
        expected = torch.cat([cut(FIELDS["ema"][p.name], p.rectangle).flatten() for p in pieces])
        assert torch.equal(file.get_tensor("ema"), expected)


def test_a_rank_may_have_nothing_to_write(tmp_path: Path) -> None:
    folder = Location(tmp_path)
    records = write(folder, [*LAYOUTS["1"], []])
    assert torch.equal(TensorReader(folder, records).read("ema", "bias"), FIELDS["ema"]["bias"])


def test_equal_layouts_read_each_field_in_one_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Location("memory://sweep")
    count, shape = 4000, (30, 25)
    pieces = [Piece(f"block.{i}", shape, Rectangle((0, 0), shape), 750 * i) for i in range(count)]
    values = torch.randn(750 * count)
    reader = TensorReader(folder, write_tensors(folder, 0, pieces, {"ema": values, "weights": values + 1}))
    ranges: list[tuple[int, int]] = []
    read_into = Location.read_into

    def spy(self: Location, offset: int, buffer: memoryview) -> int:
        ranges.append((offset, len(buffer)))
        return read_into(self, offset, buffer)

    monkeypatch.setattr(Location, "read_into", spy)
    assert torch.equal(reader.fill(pieces, "weights", torch.zeros(750 * count)), values + 1)
    assert len(ranges) == 1  # 12 MB, whole blocks
    assert sum(length for _, length in ranges) <= 4 * 750 * count + 2 * tensors.BLOCK_BYTES
    ranges.clear()
    size = tensors.BLOCK_BYTES
    reader.read("ema", "block.7")
    assert ranges == [(0, size)]
    ranges.clear()
    reader.fill([pieces[0], pieces[-1]], "ema", torch.zeros(750 * count))
    assert sorted(ranges) == [(0, size), (2 * size, size)]  # what lies between is not read


def test_every_flipped_byte_is_found_and_named(tmp_path: Path) -> None:
    records = write(Location(tmp_path), LAYOUTS["dp2"])

    def read_all() -> None:
        reader = TensorReader(Location(tmp_path), records)
        for field in FIELDS:
            reader.read_many(field, reader.names())

    read_all()
    for record in records:
        path = tmp_path / record.name
        content = path.read_bytes()
        for position in range(0, len(content), 37):
            path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
            with pytest.raises(CheckpointError, match=rf"{record.name} is damaged"):
                read_all()
        path.write_bytes(content)
    read_all()


def test_a_flipped_byte_is_located_to_its_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "BLOCK_BYTES", 64)
    for module in (reads, tensors):
        monkeypatch.setattr(module, "BLOCK_BYTES", 64)
    records = write(Location(tmp_path), LAYOUTS["1"])
    content = bytearray((tmp_path / records[0].name).read_bytes())
    content[-100] ^= 1
    (tmp_path / records[0].name).write_bytes(content)
    begin = (len(content) - 100) // 64 * 64
    reader = TensorReader(Location(tmp_path), records)
    with pytest.raises(CheckpointError, match=f"bytes {begin:,} to {begin + 64:,} are not what was written"):
        reader.read_many("ema", reader.names())
    reader.read_many("weights", reader.names())  # other blocks are still good


@pytest.mark.parametrize(
    ("lost", "reason"), [("rank_00001.safetensors", "is truncated"), ("rank_00001.json", "is damaged")]
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
        reader.fill([Piece("qkv.weight", (12, 7), Rectangle((3, 0), (3, 7)), 0)], "ema", torch.zeros(21))
    with pytest.raises(CheckpointError, match="has no tensor gate"):
        reader.fill([Piece("gate", (3,), Rectangle((0,), (3,)), 0)], "ema", torch.zeros(3))
    with pytest.raises(CheckpointError, match=r"bias is \[13\] in .*, but \[14\] here"):
        reader.fill([Piece("bias", (14,), Rectangle((0,), (14,)), 0)], "ema", torch.zeros(14))
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
        write_tensors(Location(tmp_path), 0, LAYOUTS["1"][0], {"ema": wrong})
    assert not list(tmp_path.iterdir())


def lie(key: str, value: Any) -> Callable[[dict], None]:
    return lambda content: content.update({key: value})


def change_piece(position: int, value: int) -> Callable[[dict], None]:
    return lambda content: content["pieces"].__setitem__(position, value)


HUGE = 2**59
LIES = {
    "more elements than bytes": (lie("elements", HUGE), "do not make a file"),
    "a header beyond the file": (lie("header_bytes", HUGE), "do not make a file"),
    "a field twice": (lie("fields", ["ema"] * 4), "occurs twice"),
    "a checksum less": (lambda c: c.update(blocks=c["blocks"][16:]), "number of checksums"),
    "no checksums": (lie("blocks", "z" * 16), "blocks"),
    "too many dimensions": (lie("dimensions", HUGE), "dimensions"),
    "a list cut off": (lambda c: c["pieces"].pop(), "cut off"),
    "a piece of no tensor": (change_piece(0, 99), "of no tensor"),
    "a piece beyond its tensor": (change_piece(-1, HUGE), "beyond its tensor"),
    "an offset beyond its tensor": (change_piece(2, HUGE), "beyond its tensor"),
    "an empty piece": (change_piece(-1, 0), "beyond its tensor"),
    "a negative offset": (change_piece(1, -1), "pieces"),
    "a fraction": (change_piece(1, 0.5), "pieces"),  # type: ignore[arg-type]
    "an impossible integer": (change_piece(1, 2**70), "pieces"),
    "a huge tensor": (lambda c: c["tensors"].__setitem__(1, ["bias", [HUGE, HUGE]]), "impossible shape"),
    "an empty tensor": (lambda c: c["tensors"].__setitem__(1, ["bias", [0]]), "tensors"),
    "too few elements": (lambda c: c["pieces"].__setitem__(slice(0, 9), []), "do not add up"),
    "another format": (lie("format", "pickle"), "format"),
    "another version": (lie("version", 2), "version"),
    "an unknown key": (lie("code", "import os"), "code"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_hostile_index_is_refused(tmp_path: Path, name: str) -> None:
    """The checksum of the index is right: whoever wrote it meant it."""
    change, reason = LIES[name]
    data, _ = write(Location(tmp_path), LAYOUTS["1"])
    content = json.loads((tmp_path / "rank_00000.json").read_text())
    change(content)
    with pytest.raises(CheckpointError, match=rf"rank_00000.json is not a valid index: .*{reason}"):
        TensorReader(Location(tmp_path), [data, replace_index(tmp_path, content)])


def replace_index(folder: Path, content: object) -> FileRecord:
    encoded = json.dumps(content).encode()
    (folder / "rank_00000.json").write_bytes(encoded)
    return FileRecord(name="rank_00000.json", bytes=len(encoded), xxh3=digest(encoded))


def test_a_hostile_size_is_refused_before_reading(tmp_path: Path) -> None:
    data, entry = write(Location(tmp_path), LAYOUTS["1"])
    with pytest.raises(CheckpointError, match="larger than an index can be"):
        TensorReader(Location(tmp_path), [data, entry.model_copy(update={"bytes": 2**40})])
    with pytest.raises(CheckpointError, match="no part of the checkpoint"):
        TensorReader(Location(tmp_path), [entry])


def test_a_claimed_tensor_without_bytes_takes_no_memory(tmp_path: Path) -> None:
    data, _ = write(Location(tmp_path), LAYOUTS["1"])
    content = json.loads((tmp_path / "rank_00000.json").read_text())
    content["tensors"].append(["huge", [2**58]])
    reader = TensorReader(Location(tmp_path), [data, replace_index(tmp_path, content)])
    with pytest.raises(CheckpointError, match="hole: of huge"):
        reader.read("ema", "huge")


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
        for record in write_tensors(folder, rank, [Piece("bias", (size,), box, 0)], {"ema": torch.zeros(2)})
    ]
    with pytest.raises(CheckpointError, match=r"bias is \[5\] in .*rank_00001.*, but \[4\] in another file"):
        TensorReader(folder, records)
