"""Captions on their way to the model: out of the side-cars, with their samples, padded, some dropped."""

from pathlib import Path

import pytest
import torch

from rdm_scale.batch import TrainingBatch
from rdm_scale.conditions import EncodedText, TextCondition, concatenate_conditions, replace_captions
from rdm_scale.config import DiffusionConfig
from rdm_scale.data.captions import empty_caption
from rdm_scale.data.compatibility import check_data
from rdm_scale.data.held_out import HeldOut
from rdm_scale.data.manifest import read_manifest
from rdm_scale.data.shards import PackedMember, read_bytes, write_tar
from rdm_scale.data.stream import LatentStream
from rdm_scale.diffusion import build_objective
from rdm_scale.diffusion.training_draws import draw
from rdm_scale.errors import DataError
from tests.support.small_runs import add_captions, run_config, write_latents

TEXT = {"model__condition": "text", "model__text": {"width": 6, "pooled_width": 5}}


@pytest.fixture
def captioned(tmp_path: Path) -> str:
    data = write_latents(tmp_path / "data", samples=48)
    add_captions(data)
    return data


def expected(key: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As add_captions makes them."""
    generator = torch.Generator().manual_seed(key)
    return torch.randn(1 + key % 5, 6, generator=generator), torch.randn(5, generator=generator)


def test_each_sample_comes_with_its_own_caption(captioned: str) -> None:
    stream = LatentStream(captioned, global_batch_size=8, seed=1, captions=True)
    held_out = HeldOut(captioned, 16, batch_size=8, captions=True)
    batches = [stream.batch(step) for step in (1, 2, 9)] + [batch for batch, _ in held_out]
    for batch in batches:
        text = batch.text
        assert text is not None and text.mask.any(0).all()  # no longer than the longest
        for i, key in enumerate(batch.ids.tolist()):
            tokens, pooled = expected(key)
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


def test_dropped_captions_become_the_empty_one(captioned: str) -> None:
    how = read_manifest(captioned)[0].text
    assert how is not None
    empty = empty_caption(how)
    batch = LatentStream(captioned, global_batch_size=48, seed=1, captions=True).batch(1)
    objective = build_objective(DiffusionConfig(), False)

    def drawn(dropout: float) -> TrainingBatch:
        return draw(
            batch, objective=objective, seed=3, num_classes=None, condition_dropout=dropout, empty_caption=empty
        )

    none, some, every = (drawn(dropout).model_condition for dropout in (0.0, 0.3, 1.0))
    assert all(isinstance(text, TextCondition) for text in (none, some, every))
    tokens, pooled = expected(0)
    assert torch.equal(every.pooled, pooled.expand(48, 5)) and every.mask.sum() == 48
    assert torch.equal(none.pooled, batch.text.pooled) and torch.equal(none.tokens, batch.text.tokens)
    dropped = (some.pooled == pooled).all(1)
    assert 5 < dropped.sum() < 25
    assert torch.equal(some.tokens[dropped, :1], tokens.expand(int(dropped.sum()), 1, 6))
    assert (some.mask[dropped].sum(1) == 1).all() and torch.equal(some.mask[~dropped], none.mask[~dropped])
    parts = drawn(0.3).split(20)
    assert [len(part) for part in parts] == [20, 20, 8]
    assert torch.equal(parts[1].model_condition.tokens, some.tokens[20:40])


def test_conditions_of_different_lengths_are_joined() -> None:
    one, two = (
        TextCondition.from_captions([EncodedText(torch.full((n, 2), float(n)), torch.zeros(3))]) for n in (1, 3)
    )
    both = concatenate_conditions(one, two)
    assert both.mask.tolist() == [[True, False, False], [True, True, True]]
    assert both.tokens[:, :, 0].tolist() == [[1, 0, 0], [3, 3, 3]]
    assert replace_captions(two, torch.tensor([True]), one).mask.tolist() == [[True, False, False]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__text": {"width": 7, "pooled_width": 5}}, r"set model\.text\.width=6 and model\.text\.pooled_width=5"),
        ({"data__validation": "bare"}, "has no captions: encode data with captions"),
    ],
)
def test_data_that_do_not_fit_a_text_model_are_refused(
    captioned: str, tmp_path: Path, changes: dict, message: str
) -> None:
    if "data__validation" in changes:
        changes = {"data__validation": write_latents(tmp_path / "bare", samples=8)}
    with pytest.raises(DataError, match=message):
        check_data(run_config(tmp_path, captioned, **(TEXT | changes)))


def test_the_facts_hold_the_captions_encoding_only_where_it_is_used(captioned: str, tmp_path: Path) -> None:
    assert check_data(run_config(tmp_path, captioned, **TEXT)).text is not None
    assert check_data(run_config(tmp_path, captioned)).text is None
