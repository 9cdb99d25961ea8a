"""Warnings about valid configurations that do not do what their keys promise."""

from typing import Any

import pytest

from rdm_scale.config import RunConfig, parse_config
from rdm_scale.config.doubts import doubts

PLAIN: dict[str, Any] = {
    "data": {"train": "x", "validation": "y"},
    "run": {"dir": "x"},
    "train": {"steps": 1000},
    "optimizer": {"ema_decay": 0.99, "warmup_steps": 100},
}


def config(**sections: dict[str, Any]) -> RunConfig:
    return parse_config(PLAIN | {name: PLAIN.get(name, {}) | keys for name, keys in sections.items()}, "the test")


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, None),
        ({"diffusion": {"condition_dropout": 0.0}}, None),
        ({"sampling": {"guidance": 3.0}}, None),
        (
            {"sampling": {"guidance": 3.0}, "diffusion": {"condition_dropout": 0.0}},
            "sampling.guidance=3 needs the null",
        ),
        ({"diffusion": {"condition_dropout": 1.0}}, "model.condition=class is never learned"),
        ({"optimizer": {"warmup_steps": 1000}}, "warmup_steps=1000 is not below train.steps=1000"),
        ({"optimizer": {"ema_decay": 0.9995}}, "averages over about 2,000 steps, more than train.steps=1000"),
        (
            {"optimizer": {"schedule": "cosine", "schedule_steps": 600}},
            "ends before train.steps=1000: the 400 steps after it have the learning rate 0, which changes nothing",
        ),
        ({"optimizer": {"schedule": "cosine", "schedule_steps": 1000}}, None),
        ({"monitor": {"validate_every": 2000}}, "validate_every=2000 exceeds train.steps=1000"),
        ({"monitor": {"sample_every": 2000}}, "sample_every=2000 exceeds train.steps=1000"),
        ({"monitor": {"measure_every": 2000, "reference": "r.npz"}}, "measure_every=2000 exceeds train.steps=1000"),
        ({"monitor": {"reference": "r.npz"}}, "monitor.reference has no effect with monitor.measure_every=0"),
        (
            {"diffusion": {"objective": "ddpm", "num_timesteps": 100}, "sampling": {"steps": 101}},
            "sampling.steps=101 exceeds diffusion.num_timesteps=100",
        ),
        ({"diffusion": {"num_timesteps": 100}}, "num_timesteps=100 has no effect with diffusion.objective=flow"),
        (
            {"diffusion": {"objective": "ddpm", "timestep_sampling": "logit_normal"}},
            "timestep_sampling=logit_normal has no effect with diffusion.objective=ddpm",
        ),
        ({"diffusion": {"logit_mean": 1.0}}, "logit_mean=1.0 has no effect with timestep_sampling=uniform"),
        ({"model": {"residual": "rezero", "gate": {"exponent": 1.0}}}, "model.gate has no effect"),
        ({"checkpoint": {"start_weights": "raw"}}, "has no effect without checkpoint.start_from"),
    ],
)
def test_each_doubt_is_one_line(sections: dict[str, Any], expected: str | None) -> None:
    found = doubts(config(**sections))
    assert len(found) == (0 if expected is None else 1), found
    assert expected is None or (expected in found[0] and "\n" not in found[0])


def test_weights_to_start_with_may_know_the_null_condition() -> None:
    started = config(
        sampling={"guidance": 3.0}, diffusion={"condition_dropout": 0.0}, checkpoint={"start_from": "some/run"}
    )
    assert doubts(started) == []
