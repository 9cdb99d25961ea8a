"""Sources of weights: merged folders whose configuration is wrong or malicious."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from rdm_scale.checkpoint import load_model
from rdm_scale.checkpoint.convert.merge import merge
from rdm_scale.checkpoint.model_source import open_model
from rdm_scale.errors import CheckpointError
from rdm_scale.storage.location import Location
from tests.support.saved_models import checkpoint_of


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"model": {"depth": 10**7}}}, "describes 10,000,000 blocks, but there are only"),
        ({"config": {"model": {"hidden_size": 2**40}}}, "describes 16 tokens of width 1,099,511,627,776"),
        ({"config": {"model": {"num_classes": 2**62}}}, "describes an impossible model"),
        ({"config": {"model": {"hidden_size": 48}}}, r"head.out.bias|other shapes"),
        ({"config": {"model": {"depth": 1}}}, "has unknown tensors: blocks.1"),
        ({"codec": {"name": 3}}, "codec.name"),
        ({"format": "else"}, "nor a folder that tools/merge_checkpoint.py wrote"),
    ],
)
def test_a_folder_that_contradicts_its_configuration_is_refused(
    run: Location, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    merge([open_model(checkpoint_of(run, 1))], Location(tmp_path / "out"))
    path = tmp_path / "out" / "config.json"
    tree = json.loads(path.read_text())
    for key, value in change.items():
        if key == "config":
            tree["config"]["model"] |= value["model"]
        else:
            tree[key] = value
    path.write_text(json.dumps(tree))
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=message):
        load_model(str(tmp_path / "out"))
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()
