"""DINOv2 and CLIP from local folders, with small random models saved by transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from rdm_scale.errors import ConfigError, DataError
from rdm_scale.evaluation.measurements import measure, wanted_for
from rdm_scale.evaluation.networks import load_network
from rdm_scale.evaluation.networks.vision_folders import ClipFeatures, clip_scores
from rdm_scale.evaluation.sample_sets import ArraySamples
from rdm_scale.evaluation.set_statistics import measure_set
from tests.support.text_encoders import tokenizer

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
CAPTIONS = ("a fox", "two dogs", "a cat")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=SMALL | {"vocab_size": 56, "max_position_embeddings": 12, "eos_token_id": 3},
        vision_config=SMALL | {"image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    folder = tmp_path_factory.mktemp("clip")
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer("[CLS] $A [SEP]").save_pretrained(folder)
    settings = {"crop_size": {"height": 32, "width": 32}, "image_mean": [0, 0, 0]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


def images() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 1, 32, 32, 3), dtype=np.uint8))


def test_dinov2_features_are_the_class_token(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, image_size=28, patch_size=14)).eval()
    model.save_pretrained(tmp_path)
    network = load_network(f"dinov2={tmp_path}", 1)
    assert network.identity.name.startswith("dinov2-") and network.width == 16
    assert network.identity.resize.endswith("224x224")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    flat = torch.full((1, 1, 224, 224, 3), 51, dtype=torch.uint8)
    expected = model(((0.2 - mean) / std).view(1, 3, 1, 1).expand(-1, -1, 224, 224)).last_hidden_state[:, 0]
    torch.testing.assert_close(network.extract(flat).pooled, expected.detach(), rtol=1e-4, atol=1e-5)


def test_clip_scores_are_cosines_of_embeddings(clip_folder: str) -> None:
    network = load_network(f"clip={clip_folder}", 1)
    assert isinstance(network, ClipFeatures) and network.identity.resize.endswith("32x32")
    wanted = wanted_for(["clip"], network)
    samples = ArraySamples(images().numpy(), "images")
    samples.captions = CAPTIONS
    found = measure_set(samples, network, wanted, option=f"clip={clip_folder}", batch_size=2)
    (line,) = measure(["clip"], found, found)
    image, text = network.extract(images()).pooled.double(), network.captions(CAPTIONS).double()
    cosines = (image * text).sum(1) / image.norm(dim=1) / text.norm(dim=1)
    assert line.name.startswith("CLIP score(clip-")
    assert line.value == pytest.approx(float(100 * cosines.clamp(min=0).mean()), rel=1e-6)
    assert clip_scores(torch.eye(2), -torch.eye(2)).tolist() == [0, 0]
    samples.captions = None
    with pytest.raises(ConfigError, match="a CLIP score needs samples with captions"):
        measure_set(samples, network, wanted, option="")


def test_a_batch_does_not_change_a_caption(clip_folder: str) -> None:
    """Captions of different lengths are padded, and the padding must not count."""
    network = load_network(f"clip={clip_folder}", 1)
    assert isinstance(network, ClipFeatures)
    alone = torch.cat([network.captions([caption]) for caption in CAPTIONS])
    torch.testing.assert_close(network.captions(CAPTIONS), alone, rtol=1e-4, atol=1e-6)


def test_folders_without_such_a_model_are_refused(tmp_path: Path, clip_folder: str) -> None:
    with pytest.raises(DataError, match=r"not a local folder with config.json and \*\.safetensors"):
        load_network(f"dinov2={tmp_path}", 1)
    with pytest.raises(ConfigError, match="a CLIP score needs --features clip=FOLDER, not digits"):
        wanted_for(["clip"], load_network("digits", 1))
