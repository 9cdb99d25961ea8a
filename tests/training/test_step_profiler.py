"""Traces that a run writes of some of its steps."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rdm_scale.config import parse_config
from rdm_scale.errors import ConfigError
from tests.support.rank_pool import RankPool
from tests.support.small_runs import metrics, run_config, train, write_latents


def names_in(trace: Path) -> set[str]:
    events: list[dict[str, Any]] = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return {str(event.get("name")) for event in events}


def test_a_run_traces_the_steps_and_ranks_that_it_is_told(ranks: RankPool, tmp_path: Path) -> None:
    data = write_latents(tmp_path / "latents")
    config = run_config(tmp_path, data, train__steps=5, train__profile=[2, 3], train__profile_ranks=[1])
    ranks.run(2, train, config)
    (trace,) = (Path(config.run.dir) / "profile").iterdir()
    assert trace.name == "steps_00000002-00000003_rank_00001.json.gz"
    names = names_in(trace)
    assert {"step 2", "step 3", "aten::addmm"} <= names and not {"step 1", "step 4", "step 5"} & names
    ranks.run(2, train, untraced := run_config(tmp_path / "untraced", data, train__steps=5))
    assert metrics(config.run.dir) == metrics(untraced.run.dir)
    # A run that ends before the last step to trace writes what it has.
    ranks.run(1, train, run_config(tmp_path, data, train__steps=6, train__profile=[6, 9]))
    assert (Path(config.run.dir) / "profile" / "steps_00000006-00000006_rank_00000.json.gz").exists()


def test_a_rank_that_does_not_exist_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    config = run_config(
        tmp_path, write_latents(tmp_path / "latents"), train__profile=[1, 1], train__profile_ranks=[0, 2]
    )
    with pytest.raises(ConfigError, match=r"train\.profile_ranks names rank 2, and the run has 2 ranks"):
        ranks.run(2, train, config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"profile": [3, 2]}, r"train\.profile=\[3, 2\] is not \[first, last\]"),
        ({"profile": [0, 2]}, r"train\.profile=\[0, 2\] is not \[first, last\]"),
        ({"profile_ranks": []}, r"train\.profile_ranks=\[\] must name ranks"),
        ({"profile_ranks": [-1]}, r"train\.profile_ranks=\[-1\] must name ranks"),
    ],
    ids=str,
)
def test_steps_and_ranks_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"data": {"train": "x"}, "run": {"dir": "x"}, "train": changes}, "the test")
