"""The average against its recurrence, written out for a scalar."""

import pytest
import torch

from rdm_scale.training.ema import Ema


def test_average_follows_its_recurrence_with_warm_up() -> None:
    weights = [torch.tensor([2.0])]
    ema = Ema(weights, decay=0.5)
    expected = 2.0
    for step in range(1, 12):
        weights[0].fill_(float(step * step))
        ema.update(weights, step)
        decay = min(0.5, (1 + step) / (10 + step))  # 2/11, 3/12, ... until 1/2 at step 8
        expected = decay * expected + (1 - decay) * step * step
        assert ema.flats[0].item() == pytest.approx(expected, rel=1e-6)


def test_average_of_constant_weights_is_the_weights() -> None:
    weights = [torch.randn(5), torch.randn(3)]
    ema = Ema(weights, decay=0.999)
    for step in range(1, 50):
        ema.update(weights, step)
    for mean, weight in zip(ema.flats, weights, strict=True):
        torch.testing.assert_close(mean, weight)
