"""Keys that a resumed run has changed are listed with what that does."""

from typing import Any

from rdm_scale.config import RunConfig, flatten, parse_config
from rdm_scale.training.changed_keys import EFFECTS, changed_keys


def config(**sections: dict[str, Any]) -> RunConfig:
    return parse_config({"data": {"train": "a/manifest.json"}, "run": {"dir": "x"}} | sections, "the test")


def stored(of: RunConfig) -> dict[str, Any]:
    return of.model_dump(mode="json")


def test_each_changed_key_is_a_line() -> None:
    now = config(
        optimizer={"lr": 0.5, "ema_decay": 0.9},
        train={"steps": 7},
        monitor={"tensorboard": False},
        data={"train": "b/manifest.json"},
        checkpoint={"start_from": "runs/a"},
    )
    assert changed_keys(now, stored(config())) == [
        "checkpoint.start_from: null before, runs/a now (no effect, the run has checkpoints of its own)",
        "data.train: a/manifest.json before, b/manifest.json now (the same samples, from another place)",
        "monitor.tensorboard: true before, false now (what is logged, not what is trained)",
        "optimizer.ema_decay: 0.9999 before, 0.9 now (the EMA weights follow it from this step on)",
        "optimizer.lr: 0.0001 before, 0.5 now (updates follow it from this step on)",
        "train.steps: 1000 before, 7 now (where the run ends)",
    ]
    assert changed_keys(now, stored(now)) == []


def test_keys_that_an_earlier_version_lacked_had_their_defaults() -> None:
    earlier = stored(config())
    del earlier["checkpoint"]["start_from"], earlier["parallel"]
    assert changed_keys(config(), earlier) == []
    (line,) = changed_keys(config(parallel={"zero_stage": 1}), earlier)
    assert line.startswith("parallel.zero_stage: 3 before, 1 now (how work and memory are divided")


def test_every_key_outside_the_identity_has_an_effect() -> None:
    keys = {key for key, _ in flatten(stored(config()))} - config().identity().keys()
    assert [key for key in sorted(keys) if not key.startswith(tuple(EFFECTS))] == []
