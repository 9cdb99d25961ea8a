"""Sources of weights: merged folders whose configuration is wrong or malicious."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from rdm_scale.checkpoint import load_model, load_trained
from rdm_scale.checkpoint.convert.grow import grow_checkpoint
from rdm_scale.checkpoint.convert.merge import merge
from rdm_scale.checkpoint.model_source import open_model
from rdm_scale.checkpoint.start_weights import open_weights
from rdm_scale.checkpoint.verify import verify
from rdm_scale.errors import CheckpointError, ConfigError, NonFiniteError
from rdm_scale.storage.location import Location
from tests.support.saved_models import checkpoint_of, run_config, save_model


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


def test_weights_that_are_not_finite_are_not_used(
    run: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing loads, merges, averages or grows them, and verification finds them, although all checksums match."""
    monkeypatch.setattr("rdm_scale.checkpoint.format.writer.refuse_non_finite_slices", lambda *_: None)
    save_model(run, 7, run_config(), damage={"head.out.bias": float("nan")})
    bad, good = checkpoint_of(run, 7), checkpoint_of(run, 6)
    for weights in ("ema", "raw"):
        with pytest.raises(NonFiniteError, match=r"step_00000007 is complete, but cannot be used: head.out.bias"):
            load_trained(bad, weights)  # type: ignore[arg-type]
    for sources in ([bad], [good, bad]):
        with pytest.raises(NonFiniteError, match=r"head\.out\.bias"):
            merge([open_model(source) for source in sources], Location(tmp_path / "out"))
        assert not (tmp_path / "out").exists()
    with pytest.raises(NonFiniteError, match=r"head\.out\.bias"):
        grow_checkpoint(bad, 4, str(tmp_path / "grown"))
    problems = verify(Location(bad))
    assert problems and all("values that are NaN or infinite" in problem for problem in problems)
    assert verify(Location(good)) == []


def test_weights_are_chosen_by_name_and_never_replaced(run: Location, tmp_path: Path) -> None:
    """A checkpoint holds both kinds; a merged folder holds one, which is used only if it is asked for or nothing is."""
    ema, raw = (load_trained(checkpoint_of(run, 2), weights) for weights in ("ema", "raw"))
    assert load_trained(checkpoint_of(run, 2)).weights == ema.weights == "ema" and raw.weights == "raw"
    bias = [t.model.get_parameter("head.out.bias")[0].item() for t in (ema, raw)]
    assert bias == [2.0, 3.0]
    assert load_trained(checkpoint_of(run, 2), "weights").model.get_parameter("head.out.bias")[0] == 3
    merge([open_model(checkpoint_of(run, 2), "raw")], Location(tmp_path / "merged"))
    for weights in (None, "raw", "weights"):
        found = load_trained(str(tmp_path / "merged"), weights)  # type: ignore[arg-type]
        assert found.weights == "raw" and found.model.get_parameter("head.out.bias")[0] == 3
    with pytest.raises(CheckpointError, match="merged holds the raw weights only, not the ema ones"):
        load_trained(str(tmp_path / "merged"), "ema")
    source = open_model(checkpoint_of(run, 2), "ema")
    merge([source], Location(tmp_path / "merged_ema"))
    with pytest.raises(CheckpointError, match="merged_ema holds the ema weights only, not the raw ones"):
        open_weights(str(tmp_path / "merged_ema"), "raw", source.config.model)
    with pytest.raises(CheckpointError, match="average weights of one kind"):
        merge([open_model(str(tmp_path / "merged")), open_model(checkpoint_of(run, 2))], Location(tmp_path / "mean"))
    with pytest.raises(ConfigError, match="weights='average' is unknown: choose ema, or raw"):
        load_trained(checkpoint_of(run, 2), "average")  # type: ignore[arg-type]


def test_a_run_is_found_by_its_configuration(run: Location, tmp_path: Path) -> None:
    """`checkpoint.dir` may be anywhere, and the rest of config.yaml may be of another version."""
    here = tmp_path / "moved"
    here.mkdir()
    (here / "config.yaml").write_text(f"checkpoint: {{dir: {run}}}\nsome_new_section: {{}}\n")
    assert load_trained(str(here)).step == 6
    (here / "config.yaml").write_text(f"checkpoint: {{dir: {tmp_path / 'empty'}}}\n")
    with pytest.raises(CheckpointError, match=r"nor a run or folder with one \(its checkpoint.dir is .*empty, which"):
        load_trained(str(here))
    (here / "config.yaml").write_text("checkpoint: [")
    with pytest.raises(CheckpointError, match="neither a complete checkpoint nor a run"):
        load_trained(str(here))
