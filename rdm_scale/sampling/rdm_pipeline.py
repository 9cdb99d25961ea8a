"""Inference pipeline with the interface of diffusers, for models that diffusers' classes cannot express."""

import torch
from PIL import Image
from torch import Tensor

from rdm_scale.checkpoint.trained_model import TrainedModel, load_trained
from rdm_scale.codecs import LatentCodec, codec_of
from rdm_scale.config import WeightsName
from rdm_scale.errors import ConfigError
from rdm_scale.sampling.generate import draw_latents, refuse_non_finite_samples
from rdm_scale.sampling.image_grid import to_images
from rdm_scale.sampling.requests import (
    SamplingRequest,
    override_sampling,
    refuse_untrained_guidance,
    request_labels,
    request_unconditional,
)


class RDMPipeline:
    """Draw images (or latents) for class labels from a model with any residual structure.

        pipe = RDMPipeline.from_pretrained("merged", codec="digits")
        pipe(class_labels=[0, 1, 2], num_inference_steps=25, guidance_scale=1.75, seed=0)[0].save("zero.png")

    Attributes:
        trained: the model with its configuration and class names.
        codec: decoder of its latents; None: latents are returned.
    """

    def __init__(self, trained: TrainedModel, codec: LatentCodec | None = None) -> None:
        self.trained, self.codec = trained, codec

    @staticmethod
    def from_pretrained(
        folder: str,
        codec: str | None = None,
        device: str | torch.device = "cpu",
        weights: WeightsName | None = None,
    ) -> "RDMPipeline":
        """Load a folder that tools/merge_checkpoint.py wrote, a checkpoint or a run.

        Args:
            folder: a path or any fsspec URL.
            codec: folder of the VAE that the latents were encoded with, `digits` or `identity`; None: no images.
            weights: ema or raw; None: the EMA weights where there are any.

        Raises:
            CheckpointError, DataError: the folder holds no model, or the codec is not that of the data.
        """
        trained = load_trained(folder, weights, device)
        return RDMPipeline(trained, None if codec is None else codec_of(trained.codec, device, codec))

    def __call__(
        self,
        class_labels: list[int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        num_images: int = 1,
    ) -> list[Image.Image] | Tensor:
        """Draw one sample for each label.

        Args:
            class_labels: required by a model with class condition; a model without condition draws `num_images`.
            num_inference_steps, guidance_scale: None: as in the model's `sampling` configuration.
            generator, seed: give one of them; the same seed gives the same samples.

        Returns:
            A list of PIL images with a codec, else normalized latents [B, C, T, H, W]; of clips always latents or, with
            a codec, pixels [B, 3, T, H, W] in [-1, 1].

        Raises:
            ConfigError: the model has no such labels, takes prompts, or a number of steps or scale is invalid; guidance
                by a null condition that was never trained.
            NonFiniteError: a sample holds NaN or infinity.
        """
        if generator is not None and seed is not None:
            raise ConfigError("give a generator or a seed, not both")
        if generator is not None:
            seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        config = override_sampling(self.trained.config, "as called", steps=num_inference_steps, guidance=guidance_scale)
        refuse_untrained_guidance(config)
        condition = self._request(class_labels, num_images).condition
        device = next(self.trained.model.parameters()).device
        latents = draw_latents(self.trained.model, config, condition.to(device), seed or 0)
        refuse_non_finite_samples(latents)
        if self.codec is None:
            return latents
        pixels = self.codec.decode(latents)
        return to_images(pixels[:, :, 0]) if pixels.shape[2] == 1 else pixels

    def _request(self, labels: list[int] | None, num_images: int) -> SamplingRequest:
        if self.trained.config.model.condition == "class":
            return request_labels(self.trained, labels or ())
        if labels is not None:
            kind = self.trained.config.model.condition
            raise ConfigError(f"the model has model.condition={kind}: it takes no class_labels")
        return request_unconditional(num_images)
