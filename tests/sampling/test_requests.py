"""Sampling requests: conditions in the order of an image grid, names of the columns, errors, and pixels."""

import base64
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rdm_scale.checkpoint.trained_model import TrainedModel
from rdm_scale.codecs import load_codec
from rdm_scale.conditions import EncodedText, TextCondition
from rdm_scale.config import InputConfig, ModelConfig, RunConfig, TextConfig
from rdm_scale.data.captions import pack_text
from rdm_scale.data.manifest import TextEncoding
from rdm_scale.encoding.text import TextEncoder
from rdm_scale.errors import ConfigError
from rdm_scale.models import build_model
from rdm_scale.sampling import RDMPipeline
from rdm_scale.sampling.generate import draw_pixels
from rdm_scale.sampling.requests import (
    draw_request,
    override_sampling,
    refuse_unused_options,
    request_labels,
    request_prompts,
    request_unconditional,
)
from tests.support.text_encoders import WIDTH, bert_folder


def trained(condition: str, text: TextEncoding | None = None) -> TrainedModel:
    size = InputConfig(channels=3, height=4, width=4)
    tree = {"input": size, "num_classes": 3, "hidden_size": 16, "num_heads": 2, "depth": 1, "condition": condition}
    model = ModelConfig(**tree, text=TextConfig(width=WIDTH, pooled_width=WIDTH))
    config = RunConfig(model=model, data={"train": "x"}, run={"dir": "x"})  # type: ignore[arg-type]
    config = override_sampling(config, "the test", steps=2)
    names = ("zero", "one", "two") if condition == "class" else ()
    network = build_model(model)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(network.head.out.weight, generator=generator)  # at zero it predicts zero for every step
    return TrainedModel(network, config, 7, load_codec("identity").record, names, text)


def test_labels_are_repeated_row_by_row() -> None:
    request = request_labels(trained("class"), [2, 0, 3], rows=2)
    assert request.condition.tolist() == [2, 0, 3, 2, 0, 3]
    assert (request.samples, request.columns, request.names) == (6, 3, ("two", "zero", "no class"))
    unconditional = request_unconditional(4, rows=2)
    assert (unconditional.samples, unconditional.columns, unconditional.names) == (8, 4, ())


def test_a_request_draws_the_same_pixels_as_its_conditions() -> None:
    model = trained("class")
    request, done = request_labels(model, [0, 1], rows=2), []
    pixels = draw_request(model, request, 3, batch_size=3, progress=lambda n, of: done.append((n, of)))
    # In batches of the same size: matrix products of another may be rounded otherwise.
    expected = draw_pixels(model.model, model.config, load_codec("identity"), request.condition, 3, batch_size=3)
    assert torch.equal(pixels, expected) and done == [(3, 4), (4, 4)]
    more_steps = draw_request(model, request, 3, config=override_sampling(model.config, "the test", steps=5))
    assert not torch.equal(pixels, more_steps)


def test_prompts_are_encoded_and_guided_from_the_empty_caption(tmp_path: Path) -> None:
    encoder = TextEncoder(bert_folder(tmp_path / "bert"))
    empty = EncodedText(torch.ones(1, WIDTH), torch.full((WIDTH,), 2.0))
    packed = base64.b64encode(pack_text([empty], torch.zeros(1, dtype=torch.int64), torch.float32)).decode()
    record = encoder.record
    text = TextEncoding(
        encoder=record.name, location=record.location, digest=record.digest, width=record.width,
        pooled_width=record.pooled_width, max_tokens=record.max_tokens, dtype="float32", empty=packed,
    )  # fmt: skip
    request = request_prompts(trained("text", text), ["ab", "c"], rows=2)
    captions = TextCondition.from_captions(encoder.encode(["ab", "c", "ab", "c"]))
    for found, expected in zip(request.condition, captions, strict=True):
        torch.testing.assert_close(found, expected)
    assert request.names == ("ab", "c") and request.columns == 2
    assert request.empty_caption is not None and request.empty_caption.pooled.tolist() == [[2.0] * WIDTH]


def test_conditions_of_another_kind_and_unknown_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match="labels from 0 to 2, or 3 for no class"):
        request_labels(trained("class"), [4])
    with pytest.raises(ConfigError, match="labels from 0 to 2"):
        request_labels(trained("class"), [])
    with pytest.raises(ConfigError, match=r"model\.condition=none: it takes no class labels"):
        request_labels(trained("none"), [0])
    with pytest.raises(ConfigError, match=r"model\.condition=class and got 1 prompts"):
        request_prompts(trained("class"), ["ab"])
    with pytest.raises(ConfigError, match="with the options given"):
        override_sampling(trained("class").config, "with the options given", steps=0)


@pytest.mark.parametrize(
    ("condition", "given", "message"),
    [
        ("class", {"prompt": ["a cat"]}, r"condition=class, it takes class labels: leave out --prompt"),
        ("class", {"text_encoder": "bert"}, r"leave out --text-encoder"),
        ("text", {"labels": "0-3"}, r"condition=text, it takes prompts: leave out --labels"),
        ("none", {"labels": "0-3"}, r"condition=none, it takes no condition: leave out --labels"),
    ],
)
def test_options_that_a_model_would_ignore_are_refused(condition: str, given: dict[str, str], message: str) -> None:
    config = trained(condition).config
    with pytest.raises(ConfigError, match=message):
        refuse_unused_options(config, **given)
    refuse_unused_options(config, labels=None, prompt=[], text_encoder=None)


def test_guidance_by_a_null_class_that_was_never_trained_is_refused() -> None:
    model = trained("class")
    diffusion = model.config.diffusion.model_copy(update={"condition_dropout": 0.0})
    never = replace(model, config=model.config.model_copy(update={"diffusion": diffusion}))
    guided = override_sampling(never.config, "the test", guidance=3.0)
    with pytest.raises(ConfigError, match="guidance 3 needs the null condition, which this model was never trained"):
        draw_request(never, request_labels(never, [0]), 0, config=guided)
    with pytest.raises(ConfigError, match="draw with guidance 1"):
        RDMPipeline(never)(class_labels=[0], guidance_scale=3.0)
    assert draw_request(never, request_labels(never, [0]), 0).shape[0] == 1
    assert len(RDMPipeline(never)(class_labels=[0], guidance_scale=1.0)) == 1
