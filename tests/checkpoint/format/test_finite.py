"""NaN and infinity are refused when they are written, and named; what no slice covers is ignored."""

from pathlib import Path

import pytest
import torch

from rdm_scale.checkpoint.format.finite import refuse_non_finite_tensor
from rdm_scale.checkpoint.format.slices import Region, SliceTable, TensorSlice
from rdm_scale.checkpoint.format.writer import write_tensors
from rdm_scale.errors import NonFiniteError
from rdm_scale.storage.location import Location


def table() -> SliceTable:
    """Tensors a (elements 0 to 3) and b (elements 5 to 6) of a flat buffer; element 4 is padding."""
    return SliceTable.of(
        [
            TensorSlice("a", (2, 2), Region((0, 0), (2, 2)), 0),
            TensorSlice("b", (2,), Region((0,), (2,)), 5),
        ]
    )


@pytest.mark.parametrize(("position", "name"), [(0, "a"), (3, "a"), (5, "b"), (6, "b"), (4, None)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_rank_saves_only_finite_values(tmp_path: Path, position: int, name: str | None, value: float) -> None:
    entries = {"weights": torch.ones(7), "ema": torch.ones(7)}
    entries["ema"][position] = value
    if name is None:
        assert len(write_tensors(Location(tmp_path / "step"), 0, table(), entries)) == 2
        return
    with pytest.raises(NonFiniteError, match=rf"step is not saved: the EMA weights of {name} hold NaN or infinity"):
        write_tensors(Location(tmp_path / "step"), 0, table(), entries)
    assert not list((tmp_path / "step").glob("*.index.safetensors"))


def test_many_names_are_counted(tmp_path: Path) -> None:
    many = SliceTable.of([TensorSlice(f"t{i}", (1,), Region((0,), (1,)), i) for i in range(9)])
    with pytest.raises(NonFiniteError, match="the weights of t0, t1, t2, t3 and 5 more tensors hold"):
        write_tensors(Location(tmp_path), 0, many, {"weights": torch.full((9,), float("nan"))})


def test_a_tensor_that_was_read_is_returned_or_refused() -> None:
    finite = torch.ones(3)
    assert refuse_non_finite_tensor("x", finite, "here") is finite
    with pytest.raises(NonFiniteError, match="here is complete, but cannot be used: x holds NaN or infinity"):
        refuse_non_finite_tensor("x", torch.tensor([1.0, float("inf")]), "here")
