"""Tensors written by some ranks and read by others: bitwise equal, or refused with a reason."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from rdm_scale.checkpoint.format.index import BLOCK_BYTES
from rdm_scale.checkpoint.format.reader import ReadOptions, TensorReader
from rdm_scale.checkpoint.format.slices import Region, SliceTable, TensorSlice
from rdm_scale.checkpoint.format.writer import write_tensors
from rdm_scale.errors import CheckpointError
from rdm_scale.storage.location import Location
from tests.support.tensor_layouts import ENTRIES, LAYOUTS, PADDING, SHAPES, flat, select, write

SMALL_BLOCKS = ReadOptions(block_bytes=64, window_blocks=2)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(ReadOptions(), id="blocks as in production"),
        pytest.param(SMALL_BLOCKS, id="many small blocks"),  # a small file has many, and takes several range reads
    ],
)
@pytest.mark.parametrize("writers", LAYOUTS)
def test_any_layout_reads_what_any_other_wrote(writers: str, options: ReadOptions) -> None:
    folder = Location(f"memory://any/{writers}")
    reader = TensorReader(folder, write(folder, LAYOUTS[writers], options.block_bytes), options=options)
    assert reader.entries() == list(ENTRIES)
    assert {name: reader.shape(name) for name in reader.names()} == SHAPES
    for slices in itertools.chain.from_iterable(LAYOUTS.values()):
        for entry, values in ENTRIES.items():
            expected = flat(slices, values)
            assert torch.equal(reader.fill(SliceTable.of(slices), entry, torch.full_like(expected, PADDING)), expected)
    for name, tensor in ENTRIES["ema"].items():
        assert torch.equal(reader.read("ema", name), tensor)
    weights = reader.read_many("weights", reader.names())
    assert all(torch.equal(weights[name], tensor) for name, tensor in ENTRIES["weights"].items())
    region = Region((1, 0, 1, 1), (2, 3, 1, 2))
    expected = select(ENTRIES["exp_avg"]["patch.weight"], region)
    assert torch.equal(reader.read("exp_avg", "patch.weight", region), expected)


def test_files_are_safetensors_without_padding(tmp_path: Path) -> None:
    slices = LAYOUTS["dp3"][1]
    records = write_tensors(Location(tmp_path), 4, SliceTable.of(slices), {"ema": flat(slices, ENTRIES["ema"])})
    assert [(record.name, record.bytes) for record in records] == [
        (name, (tmp_path / name).stat().st_size) for name in ("rank_00004.safetensors", "rank_00004.index.safetensors")
    ]
    with safe_open(tmp_path / "rank_00004.safetensors", "pt") as file:
        expected = torch.cat([select(ENTRIES["ema"][s.name], s.region).flatten() for s in slices])
        assert torch.equal(file.get_tensor("ema"), expected)
    with safe_open(tmp_path / "rank_00004.index.safetensors", "np") as file:
        assert bytes(file.get_tensor("names")).decode().split("\n") == list(dict.fromkeys(s.name for s in slices))
        numbers, *sides = file.get_tensor("pieces").tolist()
        assert numbers == [list(dict.fromkeys(s.name for s in slices)).index(s.name) for s in slices]
        for i, item in enumerate(slices):
            region, column = item.region, [side[i] for side in sides]
            missing = 4 - len(item.shape)
            assert column == [*region.offset, *(0,) * missing, *region.extent, *(1,) * missing]


def test_a_rank_may_have_nothing_to_write(tmp_path: Path) -> None:
    folder = Location(tmp_path)
    records = write(folder, [*LAYOUTS["1"], []])
    assert torch.equal(TensorReader(folder, records).read("ema", "bias"), ENTRIES["ema"]["bias"])


def test_tensors_are_read_in_any_order(tmp_path: Path) -> None:
    reader = TensorReader(Location(tmp_path), write(Location(tmp_path), LAYOUTS["1"]))
    found = reader.read_many("ema", list(reversed(SHAPES)))
    assert all(torch.equal(found[name], ENTRIES["ema"][name]) for name in SHAPES)


def test_equal_layouts_read_each_state_entry_in_one_range(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Location("memory://one-range")
    count, shape = 4000, (30, 25)
    slices = [TensorSlice(f"block.{i}", shape, Region((0, 0), shape), 750 * i) for i in range(count)]
    table, ends = SliceTable.of(slices), SliceTable.of([slices[0], slices[-1]])
    values = torch.randn(750 * count)
    records = write_tensors(folder, 0, table, {"ema": values, "weights": values + 1})
    reader = TensorReader(folder, records)
    ranges: list[tuple[int, int]] = []
    read_into = Location.read_into

    def spy(self: Location, offset: int, buffer: memoryview) -> int:
        ranges.append((offset, len(buffer)))
        return read_into(self, offset, buffer)

    monkeypatch.setattr(Location, "read_into", spy)
    assert torch.equal(reader.fill(table, "weights", torch.zeros(750 * count)), values + 1)
    ema, total = reader.files[0].header_bytes, 4 * 750 * count
    assert ranges == [(ema + total, total)]  # 12 MB, nothing else
    ranges.clear()
    small_windows = TensorReader(folder, records, options=ReadOptions(window_blocks=1))
    assert torch.equal(small_windows.fill(table, "ema", torch.zeros(750 * count)), values)
    assert sorted(size for _, size in ranges) == sorted([BLOCK_BYTES, BLOCK_BYTES, total - 2 * BLOCK_BYTES])
    ranges.clear()
    size = BLOCK_BYTES
    reader.read("ema", "block.7")
    assert ranges == [(ema, size)]
    ranges.clear()
    reader.fill(ends, "ema", torch.zeros(750 * count))
    assert sorted(ranges) == [(ema, size), (ema + 2 * size, total - 2 * size)]  # the blocks between them are not read


def test_every_flipped_byte_is_found_and_named(tmp_path: Path) -> None:
    records = write(Location(tmp_path), LAYOUTS["dp2"])

    def read_all() -> None:
        reader = TensorReader(Location(tmp_path), records)
        for entry in ENTRIES:
            reader.read_many(entry, reader.names())

    read_all()
    header = TensorReader(Location(tmp_path), records).files[0].header_bytes
    for record in records:
        path = tmp_path / record.name
        content = path.read_bytes()
        unused = 0 if record.xxh3 else header  # not read here; `verify` checks it
        for position in range(unused, len(content), 37):
            path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
            with pytest.raises(CheckpointError, match=rf"{record.name} is damaged"):
                read_all()
        path.write_bytes(content)
    read_all()


def test_the_error_names_the_block_of_a_flipped_byte(tmp_path: Path) -> None:
    records = write(Location(tmp_path), LAYOUTS["1"], SMALL_BLOCKS.block_bytes)
    reader = TensorReader(Location(tmp_path), records, options=SMALL_BLOCKS)
    content = bytearray((tmp_path / records[0].name).read_bytes())
    position = len(content) - 100
    content[position] ^= 1
    (tmp_path / records[0].name).write_bytes(content)
    ema = len(content) - 4 * sum(map(math.prod, SHAPES.values()))  # the last state entry
    begin = ema + (position - ema) // 64 * 64
    with pytest.raises(CheckpointError, match=f"bytes {begin:,} to {begin + 64:,} do not match their checksum"):
        reader.read_many("ema", reader.names())
    reader.read_many("weights", reader.names())  # other blocks are intact


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


def test_missing_elements_and_unknown_tensors_are_named() -> None:
    folder = Location("memory://missing")
    records = write(folder, LAYOUTS["dp3"])
    reader = TensorReader(folder, [record for record in records if "00001" not in record.name])
    with pytest.raises(CheckpointError, match=r"lacks elements of bias \[13\]: it has 8 of the 13 elements"):
        reader.read("ema", "bias")
    with pytest.raises(CheckpointError, match=r"lacks elements of qkv.weight \[12, 7\]"):
        reader.fill(
            SliceTable.of([TensorSlice("qkv.weight", (12, 7), Region((3, 0), (3, 7)), 0)]), "ema", torch.zeros(21)
        )
    with pytest.raises(CheckpointError, match="has no tensor gate"):
        reader.fill(SliceTable.of([TensorSlice("gate", (3,), Region((0,), (3,)), 0)]), "ema", torch.zeros(3))
    with pytest.raises(CheckpointError, match=r"bias has shape \[13\] in .*, but \[14\] in this model"):
        reader.fill(SliceTable.of([TensorSlice("bias", (14,), Region((0,), (14,)), 0)]), "ema", torch.zeros(14))
    with pytest.raises(CheckpointError, match="has no momentum; it has weights, exp_avg, exp_avg_sq, ema"):
        reader.read("momentum", "scale")
    with pytest.raises(CheckpointError, match="no index"):
        TensorReader(folder, [])


def test_a_region_beyond_its_tensor_takes_nothing_from_the_next() -> None:
    folder = Location("memory://beyond")
    reader = TensorReader(folder, write(folder, LAYOUTS["1"]))
    with pytest.raises(CheckpointError, match=r"of bias \[13\]: it has 3 of the 5 elements needed from \[10\] on"):
        reader.read("ema", "bias", Region((10,), (5,)))


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    (tmp_path / "rank_00000.safetensors").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"rank_00000.safetensors: No space left .*; it needs [\d,]+ bytes"):
        write(Location(tmp_path), LAYOUTS["1"])


@pytest.mark.parametrize(
    "wrong", [torch.zeros(5), torch.zeros(400, dtype=torch.float64), torch.zeros(400, 1)], ids=["short", "type", "2d"]
)
def test_state_entries_that_do_not_fit_are_refused_before_writing(tmp_path: Path, wrong: Tensor) -> None:
    with pytest.raises(ValueError, match="must be a flat fp32 CPU tensor"):
        write_tensors(Location(tmp_path), 0, SliceTable.of(LAYOUTS["1"][0]), {"ema": wrong})
    assert not list(tmp_path.iterdir())


def test_overlapping_slices_are_refused() -> None:
    folder = Location("memory://overlap")
    ranks = LAYOUTS["tp2"]
    records = write(folder, [*ranks, [TensorSlice("out.weight", (5, 8), Region((4, 3), (1, 2)), 0)]])
    with pytest.raises(CheckpointError, match=r"two slices of out.weight overlap in .*rank_00000.* and .*rank_00002"):
        TensorReader(folder, records)


def test_ranks_that_disagree_on_a_shape_are_refused() -> None:
    folder = Location("memory://shapes")
    region = Region((0,), (2,))
    records = [
        record
        for rank, size in enumerate((4, 5))
        for record in write_tensors(
            folder, rank, SliceTable.of([TensorSlice("bias", (size,), region, 0)]), {"ema": torch.zeros(2)}
        )
    ]
    with pytest.raises(CheckpointError, match=r"bias has shape \[5\] in .*rank_00001.*, but \[4\] in another file"):
        TensorReader(folder, records)
