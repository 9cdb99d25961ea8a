"""Tables of slices, compared with the slices one by one."""

from rdm_scale.checkpoint.format.slices import Region, SliceTable, TensorSlice, pad_rows
from tests.support.tensor_layouts import listed

SLICES = [
    TensorSlice("b", (), Region((), ()), 7),
    TensorSlice("a", (4, 3, 2), Region((1, 0, 1), (2, 3, 1)), 20),
    TensorSlice("b", (), Region((), ()), 30),
]


def test_slices_are_recovered_from_the_table() -> None:
    table = SliceTable.of(SLICES)
    assert listed(table) == SLICES
    assert table.names == ["b", "a"]
    assert table.ends.tolist() == [8, 26, 31] and table.buffer_elements == 31
    assert listed(SliceTable.of([])) == [] and SliceTable.of([]).names == []


def test_complete_tensors_are_stored_one_after_the_other() -> None:
    table = SliceTable.of_tensors(["x", "y", "z"], pad_rows([(2, 3), (), (5,)], 2))
    assert listed(table) == [
        TensorSlice("x", (2, 3), Region((0, 0), (2, 3)), 0),
        TensorSlice("y", (), Region((), ()), 6),
        TensorSlice("z", (5,), Region((0,), (5,)), 7),
    ]
