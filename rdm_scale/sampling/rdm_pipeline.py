"""A pipeline in the manner of diffusers, for models that its classes cannot express."""

from typing import Any

import torch

from rdm_scale.checkpoint.trained_model import TrainedModel, load_trained
from rdm_scale.codecs import LatentCodec, codec_of
from rdm_scale.config import parse_config
from rdm_scale.errors import ConfigError
from rdm_scale.sampling.generate import draw_latents
from rdm_scale.sampling.image_grid import to_images


class RDMPipeline:
    """From class labels to images (or latents) by a model with any residual structure.

        pipe = RDMPipeline.from_pretrained("merged", codec="digits")
        pipe(class_labels=[0, 1, 2], num_inference_steps=25, guidance_scale=1.75, seed=0)[0].save("zero.png")

    Attributes:
        trained: the model with its configuration and class names.
        codec: what decodes its latents; None: latents are returned.
    """

    def __init__(self, trained: TrainedModel, codec: LatentCodec | None = None) -> None:
        self.trained, self.codec = trained, codec

    @staticmethod
    def from_pretrained(folder: str, codec: str | None = None, device: str | torch.device = "cpu") -> "RDMPipeline":
        """Loads what tools/merge_checkpoint.py wrote, or a checkpoint or run.

        Args:
            folder: a path or any fsspec URL.
            codec: folder of the VAE that the latents were encoded with, `digits` or `identity`; None: no images.

        Raises:
            CheckpointError, DataError: the folder holds no model, or the codec is another one than the data's.
        """
        trained = load_trained(folder, device=device)
        return RDMPipeline(trained, None if codec is None else codec_of(trained.codec, device, codec))

    def __call__(
        self,
        class_labels: list[int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        num_images: int = 1,
    ) -> Any:
        """Draws one sample for each label.

        Args:
            class_labels: for a model with class condition; another draws `num_images`.
            num_inference_steps, guidance_scale: None: as in the model's `sampling` configuration.
            generator, seed: give one of them; the same seed gives the same samples.

        Returns:
            A list of PIL images with a codec, else normalized latents [B, C, T, H, W]; of clips always latents or, with
            a codec, pixels [B, 3, T, H, W] in [-1, 1].

        Raises:
            ConfigError: labels that the model does not have, or an impossible number of steps or scale.
        """
        config = self.trained.config
        if generator is not None and seed is not None:
            raise ConfigError("give a generator or a seed, not both")
        if generator is not None:
            seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        given = {"steps": num_inference_steps, "guidance": guidance_scale}
        tree = config.model_dump(mode="json")
        tree["sampling"] |= {key: value for key, value in given.items() if value is not None}
        labels = self._labels(class_labels, num_images)
        latents = draw_latents(self.trained.model, parse_config(tree, "as called"), labels, seed or 0)
        if self.codec is None:
            return latents
        pixels = self.codec.decode(latents)
        return to_images(pixels[:, :, 0]) if pixels.shape[2] == 1 else pixels

    def _labels(self, labels: list[int] | None, num_images: int) -> torch.Tensor:
        model, device = self.trained.config.model, next(self.trained.model.parameters()).device
        if model.condition != "class":
            if labels is not None:
                raise ConfigError(f"the model has model.condition={model.condition}: it takes no class_labels")
            return torch.zeros(num_images, dtype=torch.int64, device=device)
        if not labels or not all(0 <= label <= model.num_classes for label in labels):
            last = model.num_classes - 1
            raise ConfigError(f"class_labels={labels}: give labels from 0 to {last}, or {last + 1} for no class")
        return torch.tensor(labels, device=device)
