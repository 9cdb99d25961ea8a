"""Checkpoints written from logical tensors are read like any other, however small their files are."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from rdm_scale.checkpoint.convert.checkpoint_writer import write_checkpoint
from rdm_scale.checkpoint.directory import CheckpointDirectory
from rdm_scale.checkpoint.format.index import INDEX
from rdm_scale.errors import CheckpointError
from rdm_scale.storage.location import Location

STATE = {"step": 7, "layout": {}}
TENSORS = {
    "scale": torch.tensor(3.5),
    "bias": torch.arange(13.0),
    "weight": torch.randn(9, 7, generator=torch.Generator().manual_seed(0)),
    "turned": torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(1)).permute(2, 0, 1),
}


def stream() -> Iterator[tuple[str, dict[str, Tensor]]]:
    for name, tensor in TENSORS.items():
        yield name, {"weights": tensor, "exp_avg": torch.zeros(()).expand(tensor.shape), "ema": (2 * tensor).bfloat16()}


@pytest.fixture
def directory(tmp_path: Path) -> CheckpointDirectory:
    return CheckpointDirectory(Location(tmp_path / "checkpoints"))


@pytest.mark.parametrize(("capacity", "files"), [(1000, 1), (137, 1), (136, 2), (29, 5), (1, 137)])
def test_tensors_are_read_back(directory: CheckpointDirectory, capacity: int, files: int) -> None:
    folder = write_checkpoint(directory, STATE, stream(), capacity)
    assert folder.path == directory.folder(7).path
    assert len([name for name in folder.names() if name.endswith(INDEX)]) == files
    state, reader = directory.open(7)
    assert (state, reader.entries()) == (STATE, ["weights", "exp_avg", "ema"])
    for name, tensor in TENSORS.items():
        assert torch.equal(reader.read("weights", name), tensor)
        assert torch.equal(reader.read("exp_avg", name), torch.zeros_like(tensor))
        assert torch.equal(reader.read("ema", name), (2 * tensor).bfloat16().float())


def test_tensors_are_stored_in_order(directory: CheckpointDirectory) -> None:
    folder = write_checkpoint(directory, STATE, stream(), 20)
    with safe_open(f"{folder}/rank_00000.safetensors", "pt") as file:
        expected = torch.cat([TENSORS["scale"].view(1), TENSORS["bias"], TENSORS["weight"].flatten()[:6]])
        assert torch.equal(file.get_tensor("weights"), expected)


def test_nothing_is_left_after_a_failure_but_earlier_steps(directory: CheckpointDirectory) -> None:
    write_checkpoint(directory, STATE | {"step": 3}, stream())

    def fails() -> Iterator[tuple[str, dict[str, Tensor]]]:
        yield from stream()
        raise CheckpointError("the source is damaged")

    with pytest.raises(CheckpointError, match="the source is damaged"):
        write_checkpoint(directory, STATE, fails(), 10)
    assert directory.root.names() == ["step_00000003"]
    assert directory.steps() == [3]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (("a", {"ema": torch.ones(2)}), "a is given twice"),
        (("b", {"weights": torch.ones(2)}), "b must have the state entries ema"),
    ],
)
def test_inconsistent_tensors_are_refused(
    directory: CheckpointDirectory, second: tuple[str, dict[str, Tensor]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_checkpoint(directory, STATE, [("a", {"ema": torch.ones(3)}), second])
    assert directory.root.names() == []
