"""Drawing from a model: samples independent of their batches, guidance and steps as configured."""

import pytest
import torch
from torch import Tensor

from rdm_scale.codecs import load_codec
from rdm_scale.conditions import TextCondition
from rdm_scale.config import DiffusionConfig, InputConfig, ModelConfig, RunConfig, SamplingConfig
from rdm_scale.errors import ConfigError, NonFiniteError
from rdm_scale.sampling.generate import draw_latents, draw_pixels

CONFIG = RunConfig(
    model=ModelConfig(input=InputConfig(channels=3, height=4, width=4), num_classes=5, hidden_size=16, num_heads=2),
    diffusion=DiffusionConfig(objective="flow"),
    sampling=SamplingConfig(sampler="euler", steps=4, guidance=3.0),
    data={"train": "x"},  # type: ignore[arg-type]
    run={"dir": "x"},  # type: ignore[arg-type]
)


def straight_to_the_label(latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
    """Exact velocity for data with a single point per class: label / 10, and 0 for the null class 5."""
    point = torch.where(labels == 5, 0.0, labels / 10).view(-1, 1, 1, 1, 1)
    t = (timesteps / 1000).view(-1, 1, 1, 1, 1)
    return (latents - point) / t


def test_guidance_extrapolates_from_the_null_class() -> None:
    latents = draw_latents(straight_to_the_label, CONFIG, torch.tensor([0, 1, 3]), seed=0)
    # The guided field is that of the point 0 + 3 (label / 10 - 0), and Euler's steps follow straight lines exactly.
    expected = torch.tensor([0.0, 0.3, 0.9]).view(-1, 1, 1, 1, 1).expand(3, 3, 1, 4, 4)
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=0)


def drifting(latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
    """Velocity field whose samples depend on their noise."""
    return 0.1 * latents + labels.view(-1, 1, 1, 1, 1) / 100


def test_images_do_not_depend_on_the_batches_they_are_drawn_in() -> None:
    labels, codec = torch.tensor([0, 1, 2, 3, 4]), load_codec("identity")
    whole = draw_pixels(drifting, CONFIG, codec, labels, seed=7, batch_size=5)
    done: list[tuple[int, int]] = []
    parts = draw_pixels(drifting, CONFIG, codec, labels, 7, batch_size=2, progress=lambda n, of: done.append((n, of)))
    assert torch.equal(whole, parts) and whole.shape == (5, 3, 1, 4, 4) and done == [(2, 5), (4, 5), (5, 5)]
    assert not torch.equal(whole, draw_pixels(drifting, CONFIG, codec, labels, seed=8, batch_size=5))
    assert whole.std(0).min() > 0.01, "samples must differ from each other"


def test_clips_are_drawn_with_all_frames() -> None:
    model = CONFIG.model.model_copy(update={"input": InputConfig(channels=3, frames=3, height=4, width=4)})
    config, labels = CONFIG.model_copy(update={"model": model}), torch.tensor([0, 1])
    clips = draw_pixels(drifting, config, load_codec("identity"), labels, seed=7, batch_size=1)
    assert clips.shape == (2, 3, 3, 4, 4) and (clips[:, :, 0] - clips[:, :, 1]).abs().max() > 0.01


def test_captions_are_batched_and_guided_from_the_empty_caption() -> None:
    def to_the_pooled_value(latents: Tensor, timesteps: Tensor, text: TextCondition) -> Tensor:
        return (latents - text.pooled[:, 0].view(-1, 1, 1, 1, 1)) / (timesteps / 1000).view(-1, 1, 1, 1, 1)

    config = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update={"condition": "text"})})
    points = (0.1, 0.2, 0.3)
    captions = TextCondition.from_captions(
        [(torch.ones(n, 1), torch.tensor([p])) for n, p in enumerate(points, start=1)]
    )
    empty = TextCondition.from_captions([(torch.ones(5, 1), torch.tensor([0.05]))])
    model, codec = to_the_pooled_value, load_codec("identity")
    pixels = draw_pixels(model, config, codec, captions, seed=0, batch_size=2, empty_caption=empty)
    assert pixels[:, 0, 0, 0, 0].tolist() == pytest.approx([0.05 + 3 * (p - 0.05) for p in points], abs=1e-5)
    with pytest.raises(ConfigError, match=r"model\.condition=text: draw with prompts"):
        draw_pixels(model, config, codec, torch.tensor([1]), seed=0, batch_size=2)
    with pytest.raises(ConfigError, match=r"model\.condition=class: draw with labels"):
        draw_pixels(model, CONFIG, codec, captions, seed=0, batch_size=2)


@pytest.mark.parametrize(("bad", "cause"), [((1,), "the sampler diverged"), ((0, 1, 2), "the weights are unusable")])
def test_samples_that_are_not_finite_are_refused_in_one_line(bad: tuple[int, ...], cause: str) -> None:
    def diverging(latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        return torch.where(torch.isin(labels, torch.tensor(bad)).view(-1, 1, 1, 1, 1), float("nan"), latents)

    config = CONFIG.model_copy(update={"sampling": CONFIG.sampling.model_copy(update={"guidance": 1.0})})
    with pytest.raises(NonFiniteError, match=rf"{len(bad)} of 3 samples hold NaN or infinity: {cause}") as refused:
        draw_pixels(diverging, config, load_codec("identity"), torch.arange(3), seed=0, batch_size=3)
    assert "\n" not in str(refused.value)
