"""The diffusion transformer: patches in, a chain of gated residual blocks, a prediction of the same shape out."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdm_scale.config import ModelConfig
from rdm_scale.models.blocks import Block, SideInputs, modulated_norm
from rdm_scale.models.embeddings import (
    TimestepEmbedding,
    patchify,
    spatial_positions,
    temporal_positions,
    unpatchify,
)
from rdm_scale.models.init import initialise
from rdm_scale.models.layers import LayerFactory


class Head(nn.Module):
    """Modulated norm and a linear layer from the stream to patches."""

    def __init__(self, width: int, outputs: int, layers: LayerFactory) -> None:
        super().__init__()
        self.modulation = layers.gathered(width, 2 * width)
        self.out = nn.Linear(width, outputs)

    def forward(self, z_SBD: Tensor, side: SideInputs) -> Tensor:
        shift_BD, scale_BD = self.modulation(F.silu(side.condition)).chunk(2, dim=-1)
        return self.out(modulated_norm(z_SBD, shift_BD, scale_BD))


class DiffusionTransformer(nn.Module):
    """DiT (arXiv 2212.09748) with the residual structure of the configuration; `adaln_zero` is DiT itself.

    The stream z is [S, B, D], tokens first, in `residual_dtype`; branches compute in the type of their weights.
    `embed`, each entry of `blocks`, and `unembed` are separate steps, so that a pipeline can place them.
    """

    pos_spatial: Tensor
    pos_temporal: Tensor

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        super().__init__()
        self.config = config
        self.residual_dtype = torch.float32
        (t, h, w), size, width = config.patch_size, config.input, config.hidden_size
        self.patch_embed = nn.Linear(size.channels * t * h * w, width)
        self.register_buffer("pos_spatial", spatial_positions(width, size.height // h, size.width // w), False)
        if size.frames > 1:
            self.register_buffer("pos_temporal", temporal_positions(width, size.frames // t), False)
        self.timestep_embed = TimestepEmbedding(width, config.timestep_spacing)
        self.class_embed = nn.Embedding(config.num_classes + 1, width) if config.condition == "class" else None
        self.blocks = nn.ModuleList(Block(config, layers) for _ in range(config.depth))
        channels = size.channels * (2 if config.learned_variance else 1)
        self.head = Head(width, channels * t * h * w, layers)

    def forward(self, latents: Tensor, timesteps: Tensor, condition: Tensor | None = None) -> Tensor:
        """Predicts noise or velocity.

        Args:
            latents: [B, C, T, H, W], normalised and noised.
            timesteps: [B], 0 to 1000 (flow: 1000 * t).
            condition: int64 labels [B], `num_classes` being the null class; None without class condition.

        Returns:
            [B, C, T, H, W] in fp32, or [B, 2C, T, H, W] with learned variance.
        """
        z_SBD, side = self.embed(latents, timesteps, condition)
        for block in self.blocks:
            z_SBD = block(z_SBD, side)
        return self.unembed(z_SBD, side)

    def embed(self, latents: Tensor, timesteps: Tensor, condition: Tensor | None) -> tuple[Tensor, SideInputs]:
        """Tokens [S, B, D] with positions, and what accompanies them."""
        tokens = patchify(latents, self.config.patch_size).to(self.patch_embed.weight.dtype)
        z_SBD = self.patch_embed(tokens).to(self.residual_dtype) + self._positions()[:, None].to(self.residual_dtype)
        condition_BD = self.timestep_embed(timesteps)
        if self.class_embed is not None:
            condition_BD = condition_BD + self.class_embed(condition)
        return z_SBD, SideInputs(condition_BD)

    def unembed(self, z_SBD: Tensor, side: SideInputs) -> Tensor:
        """The stream to a prediction in fp32."""
        size = self.config.input
        tokens = self.head(z_SBD, side).float()
        return unpatchify(tokens, self.config.patch_size, (size.frames, size.height, size.width))

    def _positions(self) -> Tensor:
        """[S, D]: the sum of where and when."""
        if self.config.input.frames == 1:
            return self.pos_spatial
        return (self.pos_temporal[:, None] + self.pos_spatial[None]).flatten(0, 1)


def build_model(config: ModelConfig, seed: int = 0, layers: LayerFactory | None = None) -> DiffusionTransformer:
    """The model of a configuration, initialised from `seed`; on the meta device it has shapes only."""
    model = DiffusionTransformer(config, layers or LayerFactory())
    if not model.patch_embed.weight.is_meta:
        initialise(model, seed)
    return model
