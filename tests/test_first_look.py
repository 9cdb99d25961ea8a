"""The notebook docs/first_look.ipynb runs on a model trained with the quickstart's configuration."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.limits import HANG_S

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "first_look.ipynb"
RUN = '"../runs/quickstart"'  # as the notebook names the run


def python(folder: Path, *arguments: object) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, env=environment, check=True, timeout=HANG_S)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Directory of a short run on one rank."""
    latents, validation = tmp_path / "latents", tmp_path / "validation"
    python(tmp_path, ROOT / "tools/make_digits.py", "digits.tar")
    encoding = ("--codec", "digits", "--size", 32, "--holdout", validation)
    python(tmp_path, ROOT / "tools/encode_latents.py", "digits.tar", latents, *encoding)
    overrides = (
        f"data.train={latents}/manifest.json",
        f"data.validation={validation}/manifest.json",
        f"run.dir={tmp_path}/run",
        "train.steps=20",
    )
    python(tmp_path, "-m", "rdm_scale.train", ROOT / "configs/quickstart.yaml", *overrides)
    return tmp_path / "run"


@pytest.mark.full
@pytest.mark.timeout(3000)
def test_the_notebook_runs(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # inherited by the kernel
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    book = nbformat.read(NOTEBOOK, as_version=4)
    places = [cell for cell in book.cells if cell.cell_type == "code" and RUN in cell.source]
    assert len(places) == 1
    places[0].source = places[0].source.replace(RUN, f'"{run}"')
    NotebookClient(
        book, timeout=HANG_S, kernel_name="python3", resources={"metadata": {"path": NOTEBOOK.parent}}
    ).execute()
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "in 6 blocks of width 96, step 20" in text
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(figures) == 4  # samples, guidance, gates, loss


def test_the_notebook_is_stored_without_outputs() -> None:
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    assert all(not cell.outputs and cell.execution_count is None for cell in book.cells if cell.cell_type == "code")
