"""Captions from side-car shards to batches: each with its sample, padded to the longest."""

import pytest
import torch

from rdm_scale.data.held_out import HeldOut
from rdm_scale.data.manifest import read_manifest
from rdm_scale.data.shard_writer import PackedMember, write_tar
from rdm_scale.data.shards import read_bytes
from rdm_scale.data.stream import LatentStream
from rdm_scale.errors import DataError
from tests.support.small_runs import caption_of


def test_each_sample_comes_with_its_own_caption(captioned: str) -> None:
    stream = LatentStream(captioned, global_batch_size=8, seed=1, captions=True)
    held_out = HeldOut(captioned, 16, batch_size=8, captions=True)
    batches = [stream.batch(step) for step in (1, 2, 9)] + [batch for batch, _ in held_out]
    for batch in batches:
        text = batch.text
        assert text is not None and text.mask.any(0).all()  # padded to the longest, not beyond
        for i, key in enumerate(batch.ids.tolist()):
            tokens, pooled = caption_of(key)
            assert torch.equal(text.tokens[i, text.mask[i]], tokens) and torch.equal(text.pooled[i], pooled)
            assert text.mask[i].sum() == len(tokens) and not text.tokens[i, len(tokens) :].any()


def test_captions_of_other_samples_are_refused(captioned: str) -> None:
    manifest, folder = read_manifest(captioned)
    first = manifest.shards[0]
    assert first.text is not None
    members = [read_bytes(folder, first.text, number) for number in range(len(first.members))]
    packed = [PackedMember(m.name, m.samples, content) for m, content in zip(first.members, members[::-1], strict=True)]
    swapped = first.model_copy(update={"text": write_tar(folder, first.text.name, packed)})
    (folder / "manifest.json").write(manifest.model_copy(update={"shards": (swapped, *manifest.shards[1:])}).to_json())
    stream = LatentStream(captioned, global_batch_size=48, seed=1, captions=True)
    with pytest.raises(DataError, match="captions of other samples"):
        stream.batch(1)
