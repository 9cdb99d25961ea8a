"""The held-out samples of validation: each once over all ranks, and the same in every layout."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rdm_scale.batch import LatentBatch
from rdm_scale.data.held_out import HeldOut
from rdm_scale.errors import ConfigError
from tests.support.latent_sets import WriteSet


class RankBatch(NamedTuple):
    rank: int
    batch: LatentBatch
    weights: Tensor


def batches_of_all_ranks(url: str, samples: int, batch_size: int, dp: int) -> Iterator[RankBatch]:
    for rank in range(dp):
        for batch, weights in HeldOut(url, samples, batch_size=batch_size, dp_rank=rank, dp_size=dp):
            yield RankBatch(rank, batch, weights)


@pytest.mark.parametrize(
    ("samples", "batch", "dp"), [(29, 4, 1), (29, 4, 2), (11, 2, 4), (3, 2, 4), (100, 16, 3), (1, 1, 1), (8, 4, 2)]
)
def test_every_held_out_sample_is_read_once_over_the_ranks(
    write_set: WriteSet, samples: int, batch: int, dp: int
) -> None:
    latents = write_set(29)
    size = min(samples, 29)
    seen, batches = [], Counter[int]()
    for rank, part, weights in batches_of_all_ranks(latents.url, samples, batch, dp):
        assert part.latents.shape == (batch, 2, 1, 3, 3) and weights.dtype == torch.float64
        assert set(weights.tolist()) <= {0.0, 1.0}
        assert torch.equal(part.ids, part.positions + 1000)
        assert torch.equal(part.latents, latents.latents[part.positions])
        assert torch.equal(part.labels, latents.labels[part.positions])
        seen += part.positions[weights == 1].tolist()
        batches[rank] += 1
    assert sorted(seen) == list(range(size))
    # Every rank has the same number of batches, as collectives need.
    assert set(batches.values()) == {-(-size // (batch * dp))} and len(batches) == dp
    held_out = HeldOut(latents.url, samples, batch_size=batch, dp_size=dp)
    assert held_out.samples == size and len(held_out) == batches[0]


def test_a_held_out_sample_is_the_same_in_every_layout_and_run(write_set: WriteSet) -> None:
    latents = write_set(29, kind="moments")
    draws: dict[int, Tensor] = {}
    for batch, dp in ((29, 1), (4, 2), (3, 4)):
        for _, part, _ in batches_of_all_ranks(latents.url, 29, batch, dp):
            for position, values in zip(part.positions.tolist(), part.latents, strict=True):
                assert torch.equal(values, draws.setdefault(position, values))
    assert len(draws) == 29


@pytest.mark.parametrize(("samples", "batch", "rank", "dp"), [(0, 1, 0, 1), (1, 0, 0, 1), (1, 1, 1, 1)])
def test_impossible_sizes_and_ranks_are_refused(
    write_set: WriteSet, samples: int, batch: int, rank: int, dp: int
) -> None:
    with pytest.raises(ConfigError):
        HeldOut(write_set(4).url, samples, batch_size=batch, dp_rank=rank, dp_size=dp)
