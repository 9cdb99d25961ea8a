"""Decay of the EMA weights, compared with its written-out warm-up."""

import pytest

from rdm_scale.config import OptimizerConfig
from rdm_scale.training.ema import ema_decay


def test_decay_warms_up_to_its_limit() -> None:
    config = OptimizerConfig(ema_decay=0.5)
    warm_up = [2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5, 0.5]
    assert [ema_decay(config, step) for step in range(1, 11)] == pytest.approx(warm_up)
