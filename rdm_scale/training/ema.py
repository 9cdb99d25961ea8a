"""Decay of the exponential moving average (EMA) of the weights."""

from rdm_scale.config import OptimizerConfig


def ema_decay(config: OptimizerConfig, step: int) -> float:
    """Decay at step `step`, counted from 1: min(ema_decay, (1 + step) / (10 + step)).

    The warm-up lets the average forget the initial weights.
    """
    return min(config.ema_decay, (1 + step) / (10 + step))
