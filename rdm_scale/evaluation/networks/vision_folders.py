"""DINOv2 and CLIP as feature networks, from local folders that transformers saved.

FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675) follows human judgment better than FID; the CLIP score (Hessel et al.
2021, arXiv 2104.08718) measures how images fit their captions. Shapes: B images or captions, D features.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rdm_scale.errors import DataError
from rdm_scale.evaluation.networks.feature_network import FeatureNetwork, Features, NetworkIdentity
from rdm_scale.evaluation.networks.resizing import BICUBIC, bicubic_uint8, frames_first
from rdm_scale.storage.json_files import read_json_object
from rdm_scale.storage.location import Location

_SIZE = 224  # of images, where the folder does not say
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PREPROCESSOR = "preprocessor_config.json"


class _FolderFeatures(FeatureNetwork):
    """Network of images in a local folder of transformers; only safetensors are loaded, and no code."""

    kind: str
    model_class: str

    def __init__(self, folder: str, device: torch.device | str = "cpu") -> None:
        import transformers

        path = Path(folder)
        weights = sorted(path.glob("*.safetensors"))
        if not weights:
            raise DataError(
                f"{folder} is not a local folder with config.json and *.safetensors, as transformers saves it"
            )
        self.folder, self.device = path, torch.device(device)
        try:
            self.network: Any = getattr(transformers, self.model_class).from_pretrained(
                path, local_files_only=True, use_safetensors=True, trust_remote_code=False
            )
        except Exception as error:
            raise DataError(f"{folder} is not a {self.kind} of transformers: {str(error).splitlines()[0]}") from None
        self.network = self.network.float().eval().requires_grad_(False).to(self.device)
        digest = hashlib.sha256()
        for file in weights:
            digest.update(file.read_bytes())
        self.size, self.mean, self.std = _preprocessing(path)
        name = f"{self.kind.lower()}-{digest.hexdigest()[:8]}"
        self.identity = NetworkIdentity(name, digest.hexdigest(), BICUBIC.format(self.size))

    def _normalized(self, pixels_BTHWC: Tensor) -> Tensor:
        images = bicubic_uint8(frames_first(pixels_BTHWC), self.size) / 255
        mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


class Dinov2Features(_FolderFeatures):
    """The class token of DINOv2 after the last normalization."""

    kind, model_class = "DINOv2", "Dinov2Model"

    def __init__(self, folder: str, device: torch.device | str = "cpu") -> None:
        super().__init__(folder, device)
        self.width = int(self.network.config.hidden_size)

    def _features(self, pixels_BTHWC: Tensor) -> Features:
        return Features(self.network(pixel_values=self._normalized(pixels_BTHWC)).pooler_output)


class ClipFeatures(_FolderFeatures):
    """Image embeddings of CLIP, and the score of images against captions."""

    kind, model_class = "CLIP", "CLIPModel"

    def __init__(self, folder: str, device: torch.device | str = "cpu") -> None:
        super().__init__(folder, device)
        self.width = int(self.network.config.projection_dim)

    def _features(self, pixels_BTHWC: Tensor) -> Features:
        return Features(_embedding(self.network.get_image_features(pixel_values=self._normalized(pixels_BTHWC))))

    @torch.no_grad()
    def captions(self, captions: Sequence[str]) -> Tensor:
        """Embeddings [B, D] of captions, which are truncated to the length that the model takes.

        Raises:
            DataError: the folder has no tokenizer.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{self.folder} has no tokenizer, which captions need: {reason}") from None
        tokens = tokenizer(
            list(captions),
            padding=True,
            truncation=True,
            max_length=self.network.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        found = self.network.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return _embedding(found).float().cpu()


def clip_scores(images_BD: Tensor, captions_BD: Tensor) -> Tensor:
    """CLIP score of each image and its caption, 100 max(cos, 0), float64 [B]."""
    return 100 * torch.cosine_similarity(images_BD.double(), captions_BD.double()).clamp(min=0)


def _embedding(found: Any) -> Tensor:
    """The projected embedding, which newer versions of transformers return in an object."""
    return found if isinstance(found, Tensor) else found.pooler_output


def _preprocessing(folder: Path) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Size of images, and the mean and standard deviation of their channels."""
    file = Location(folder / _PREPROCESSOR)
    config = read_json_object(file, DataError) if file.exists() else {}
    size = config.get("crop_size", config.get("size", _SIZE))
    if isinstance(size, dict):
        size = size.get("height", size.get("shortest_edge", _SIZE))
    return int(size), tuple(config.get("image_mean", _MEAN)), tuple(config.get("image_std", _STD))
