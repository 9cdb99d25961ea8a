"""A small run for the tests of checkpoints."""

from pathlib import Path

import pytest

from rdm_scale.storage.location import Location
from tests.support.saved_models import run_config, save_model


@pytest.fixture
def run(tmp_path: Path) -> Location:
    """Directory of the checkpoints of a run, of the steps 1, 2 and 6."""
    folder = Location(tmp_path / "run" / "checkpoints")
    for step in (1, 2, 6):
        save_model(folder, step, run_config())
    return folder
