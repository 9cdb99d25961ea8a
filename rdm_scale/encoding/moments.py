"""First and second moments of latents, accumulated over batches."""

import torch
from torch import Tensor


class MomentAccumulator:
    """Running mean and standard deviation of tensors [B, C, ...], in float64.

    Args:
        channels: C, to accumulate each channel separately; None: one mean and deviation over all elements.

    Attributes:
        count: number of elements, of one channel if these are separate.
        total: sum of the elements, [C] or [].
        squares: sum of their squares, [C] or [].
    """

    def __init__(self, channels: int | None = None) -> None:
        shape = () if channels is None else (channels,)
        self._by_channel = channels is not None
        self.count = 0
        self.total = torch.zeros(shape, dtype=torch.float64)
        self.squares = torch.zeros(shape, dtype=torch.float64)

    def add(self, values: Tensor, variance: Tensor | None = None) -> None:
        """Add a batch of values.

        Args:
            values: [B, C, ...]; of distributions their means.
            variance: of the distributions, in the shape of `values`; None: 0.
        """
        dims = [dim for dim in range(values.ndim) if dim != 1 or not self._by_channel]
        values = values.double()
        squares = values.square() if variance is None else values.square() + variance
        self.add_sums(values[:, 0].numel() if self._by_channel else values.numel(), values.sum(dims), squares.sum(dims))

    def add_sums(self, count: int, total: Tensor | float, squares: Tensor | float) -> None:
        """Add the attributes of another accumulator."""
        self.count += count
        self.total += total
        self.squares += squares

    @property
    def mean(self) -> Tensor:
        """Mean over all elements so far, [C] or []; 0 before there are any."""
        return self.total / max(1, self.count)

    @property
    def std(self) -> Tensor:
        """Standard deviation over all elements so far (not corrected for bias), [C] or []."""
        return (self.squares / max(1, self.count) - self.mean.square()).clamp(min=0).sqrt()
