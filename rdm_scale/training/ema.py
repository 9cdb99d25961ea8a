"""Exponential moving average of the master weights, sharded as they are."""

import torch
from torch import Tensor


class Ema:
    """Averages of this rank's flat fp32 master buffers.

    The decay warms up as min(decay, (1 + step) / (10 + step)), so that the average forgets the initial weights.
    """

    def __init__(self, masters: list[Tensor], decay: float) -> None:
        self.decay = decay
        self.flats = [master.clone() for master in masters]

    @torch.no_grad()
    def update(self, masters: list[Tensor], step: int) -> None:
        """Takes in the weights after step `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.flats, masters, 1 - decay)
