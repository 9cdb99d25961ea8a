"""Checkpoints do not depend on the layout: every layout loads them bit for bit and resumes from them."""

from pathlib import Path

import pytest
import torch

from rdm_scale.checkpoint.convert.checkpoint_writer import STATE_ENTRIES
from rdm_scale.checkpoint.directory import CheckpointDirectory, open_checkpoint
from rdm_scale.config import RunConfig
from rdm_scale.storage.location import Location
from tests.support.layouts import Case
from tests.support.rank_pool import RankPool
from tests.support.small_runs import metrics, run_config, train, write_latents

# Both sides cover uneven stages (9 blocks), chunks, sharded qkv, ranges of 3 ranks and all ZeRO stages.
PAIRS = {
    Case(2, 2, 2, "3 kept", "1f1b", "none", True): [
        Case(1, 1, 3, "1", "1f1b", "none", False),
        Case(1, 1, 1, "0", "1f1b", "none", False),
        Case(4, 2, 1, "3 by block", "v_1f1b", "none", False),
    ],
    Case(1, 4, 2, "2", "v_1f1b", "none", False): [
        Case(4, 1, 2, "3 by block", "1f1b", "full", False),
        Case(2, 1, 3, "3 kept", "1f1b", "none", True),
        Case(1, 2, 2, "1", "interleaved_1f1b", "none", False),
    ],
    Case(1, 1, 3, "3 by block", "1f1b", "none", False): [
        Case(2, 4, 1, "3 kept", "interleaved_1f1b", "none", False),
        Case(1, 1, 8, "3 kept", "1f1b", "none", False),
        Case(1, 8, 1, "2", "1f1b", "none", False),
    ],
    Case(8, 1, 1, "1", "1f1b", "none", True): [
        Case(1, 2, 3, "0", "v_1f1b", "selective", False),
        Case(2, 1, 4, "2", "1f1b", "none", False),
        Case(1, 3, 1, "3 kept", "1f1b", "none", False),
    ],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_latents(tmp_path_factory.mktemp("latents"))


def train_after_a_copy(config: RunConfig, copy: str) -> None:
    """Run on each rank: save the loaded state to `copy`, then train."""
    from rdm_scale.checkpoint import Saver
    from rdm_scale.training.trainer import Trainer

    run = Trainer.run

    def copy_and_run(self: Trainer) -> None:
        directory = CheckpointDirectory(Location(copy))
        Saver(directory, config.checkpoint, self.model, self.mesh, print).save(self.state())
        run(self)

    Trainer.run = copy_and_run  # type: ignore[method-assign]
    train(config)


@pytest.mark.parametrize("source", PAIRS, ids=str)
def test_a_checkpoint_of_one_layout_loads_in_another(source: Case, ranks: RankPool, data: str, tmp_path: Path) -> None:
    whole = run_config(tmp_path / "whole", data, **(source.changes() | {"checkpoint__every": 5}))
    ranks.run(source.world, train, whole)
    written = Path(whole.run.dir) / "checkpoints" / "step_00000005"
    state, reader = open_checkpoint(Location(written))
    names = reader.names()
    for i, target in enumerate(PAIRS[source]):
        changes = target.changes() | {"checkpoint__resume": str(written)}
        config = run_config(tmp_path / str(i), data, **changes)
        ranks.run(target.world, train_after_a_copy, config, str(tmp_path / str(i) / "copy"))

        state_again, again = CheckpointDirectory(Location(tmp_path / str(i) / "copy")).open(5)
        assert sorted(again.names()) == sorted(names) and again.entries() == list(STATE_ENTRIES)
        for entry in STATE_ENTRIES:
            copied, original = again.read_many(entry, names), reader.read_many(entry, names)
            assert all(torch.equal(copied[name], original[name]) for name in names), (target, entry)
        for key in ("step", "samples", "identity", "codec", "class_names", "lost_shards"):
            assert state_again[key] == state[key]
        losses = [[r["loss"] for r in metrics(run.run.dir) if r["step"] > 5] for run in (config, whole)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 5, target
