"""Verification of checkpoints: every damaged block is named."""

from pathlib import Path

import pytest

from rdm_scale.checkpoint.verify import verify
from rdm_scale.errors import CheckpointError
from rdm_scale.storage.location import Location
from tests.support.saved_models import checkpoint_of, damaged_bytes, flip


def test_verification_names_every_damaged_block(run: Location) -> None:
    folder = Location(checkpoint_of(run, 2))
    assert verify(folder) == []
    flip(Path(folder.path) / "rank_00000.safetensors", 500)
    flip(Path(folder.path) / "rank_00003.safetensors", 5)
    first, second = verify(folder)
    begin, end = damaged_bytes("rank_00000.safetensors", first)
    assert begin <= 500 < end
    assert damaged_bytes("rank_00003.safetensors", second)[0] == 0  # its header
    flip(Path(folder.path) / "rank_00001.index.safetensors", 5)
    with pytest.raises(CheckpointError, match=r"rank_00001.index.safetensors is damaged"):
        verify(folder)
