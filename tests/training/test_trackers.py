"""Trackers: which a configuration asks for, and TensorBoard's events across a resume."""

from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rdm_scale.config import RunConfig
from rdm_scale.training.trackers import TensorBoardTracker, Tracker, build_trackers


def config_in(path: Path, tensorboard: bool) -> RunConfig:
    tree = {"data": {"train": "x"}, "run": {"dir": str(path)}, "monitor": {"tensorboard": tensorboard}}
    return RunConfig.model_validate(tree)


def test_trackers_are_those_of_the_configuration(tmp_path: Path) -> None:
    assert build_trackers(config_in(tmp_path, tensorboard=False), first_step=0) == []
    (tracker,) = build_trackers(config_in(tmp_path, tensorboard=True), first_step=0)
    tracker.close()
    assert isinstance(tracker, TensorBoardTracker)
    assert list((tmp_path / "tensorboard").iterdir())


def test_tensorboard_hides_steps_that_a_resumed_run_repeats(tmp_path: Path) -> None:
    first = TensorBoardTracker(tmp_path, first_step=0)
    for step in (1, 2, 3, 4):
        first.log_metrics(step, {"loss": 1.0})
    first.close()
    second = TensorBoardTracker(tmp_path, first_step=2)  # its checkpoint is of step 2
    second.log_metrics(3, {"loss": 0.5})
    second.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 1.0), (3, 0.5)]


def test_a_tracker_drops_what_it_does_not_override() -> None:
    tracker = Tracker()
    tracker.log_metrics(1, {"loss": 1.0})
    tracker.log_image(1, "samples", np.zeros((2, 2, 3), np.uint8))
    tracker.close()
