"""Moments accumulated over batches against those of numpy over all values."""

import numpy as np
import pytest
import torch

from rdm_scale.encoding.moments import MomentAccumulator


def test_each_channel_and_all_elements() -> None:
    values = 3 + 2 * torch.randn(50, 4, 1, 5, 6, generator=torch.Generator().manual_seed(0))
    by_channel, overall = MomentAccumulator(4), MomentAccumulator()
    for batch in values.split(20):
        by_channel.add(batch)
        overall.add(batch)
    array = values.double().numpy()
    assert by_channel.count == 50 * 5 * 6 and overall.count == values.numel()
    np.testing.assert_allclose(by_channel.mean, array.mean((0, 2, 3, 4)), rtol=1e-12)
    np.testing.assert_allclose(by_channel.std, array.std((0, 2, 3, 4)), rtol=1e-9)
    assert (float(overall.mean), float(overall.std)) == pytest.approx((array.mean(), array.std()), rel=1e-9)


def test_variances_of_distributions_add_to_that_of_their_means() -> None:
    values, variance = torch.randn(2, 30, 3, 8, generator=torch.Generator().manual_seed(0)).double()
    variance = variance.exp()
    moments = MomentAccumulator(3)
    moments.add(values, variance)
    expected = values.var((0, 2), correction=0) + variance.mean((0, 2))
    torch.testing.assert_close(moments.std.square(), expected)


def test_sums_of_other_accumulators_and_nothing() -> None:
    values = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    parts, joined, plain = (MomentAccumulator() for _ in range(3))
    parts.add(values[:7])
    joined.add(values[7:])
    joined.add_sums(parts.count, float(parts.total), float(parts.squares))
    plain.add(values)
    assert joined.count == 40 and float(joined.std) == pytest.approx(float(plain.std), rel=1e-12)
    empty = MomentAccumulator(2)
    assert empty.mean.tolist() == empty.std.tolist() == [0.0, 0.0]
