"""Assembly of batches: dtypes, normalization, and samples of the posterior."""

import pytest
import torch

from rdm_scale.codecs.record import CodecRecord
from rdm_scale.data.assembly import posterior_sample, stack_float32
from rdm_scale.data.buffer_pool import BufferPool
from rdm_scale.data.loaded_samples import LoadedSample
from rdm_scale.dtypes import STORED_DTYPES
from tests.support.latent_sets import WriteSet, open_reader, reads_of_members


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(2, 1, 3, 3), (4, 8, 32, 40)], ids=["small", "large"])
def test_samples_are_stacked_in_float32_in_the_given_order(
    write_set: WriteSet, shape: tuple[int, int, int, int], dtype: str
) -> None:
    latents = write_set(9, shape=shape, dtype=dtype)
    (first, second) = open_reader(latents).get(reads_of_members(latents)[:2])  # 4 samples each
    samples = [LoadedSample(second, 3), LoadedSample(first, 0), LoadedSample(second, 1)]
    stacked = stack_float32(samples, shape, STORED_DTYPES[dtype].torch, BufferPool())
    assert stacked.dtype == torch.float32
    assert torch.equal(stacked, latents.latents[[7, 0, 5]].float())


@pytest.mark.parametrize("shape", [(2, 1, 3, 3), (2, 8, 64, 64)], ids=["small", "large"])
def test_samples_are_normalized_as_they_are_stacked(write_set: WriteSet, shape: tuple[int, int, int, int]) -> None:
    codec = CodecRecord(name="vae", location="vae", shift=(1.0, -2.0), scale=(0.5, 4.0))
    latents = write_set(9, shape=shape, dtype="float16", codec=codec)
    (members,) = open_reader(latents).get(reads_of_members(latents)[1:2])  # samples 4 to 7
    samples = [LoadedSample(members, 2), LoadedSample(members, 0), LoadedSample(members, 2)]
    stacked = stack_float32(samples, shape, torch.float16, BufferPool(), codec)
    raw = latents.latents[[6, 4, 6]].float()
    assert torch.equal(stacked[:, 0], (raw[:, 0] - 1) * 0.5) and torch.equal(stacked[:, 1], (raw[:, 1] + 2) * 4)


def test_log_variances_are_clamped() -> None:
    log_variance = torch.tensor([-1e4, -30.0, 0.0, 20.0, 1e4]).view(1, 5, 1, 1, 1)
    moments = torch.cat([torch.full_like(log_variance, 3.0), log_variance], dim=1)
    spread = posterior_sample(moments, torch.ones(1, 5, 1, 1, 1)).flatten() - 3
    expected = torch.tensor([-15.0, -15.0, 0.0, 10.0, 10.0]).exp()
    torch.testing.assert_close(spread, expected, rtol=1e-6, atol=3e-7)
