"""Diffusion transformer: patch embedding, blocks of gated residual branches, and a linear head.

Shapes: S tokens, B samples, C channels, D hidden size.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdm_scale.conditions import Condition, TextCondition
from rdm_scale.config import ModelConfig
from rdm_scale.models.blocks import Block, Conditioning, modulated_norm
from rdm_scale.models.embeddings import (
    PooledEmbedding,
    TimestepEmbedding,
    axial_rope,
    patchify,
    spatial_positions,
    table_on,
    temporal_positions,
    unpatchify,
)
from rdm_scale.models.initialization import initialize
from rdm_scale.models.layers import LayerFactory


@dataclass(frozen=True)
class ModelPart:
    """Part of a model that a process holds: some of its blocks and, optionally, its embeddings and its head."""

    blocks: tuple[int, ...]
    embeds: bool = True
    unembeds: bool = True

    @staticmethod
    def full(config: ModelConfig) -> "ModelPart":
        return ModelPart(tuple(range(config.depth)))


class Head(nn.Module):
    """adaLN-modulated norm and a linear layer from hidden states to patches."""

    def __init__(self, width: int, outputs: int, layers: LayerFactory) -> None:
        super().__init__()
        self.modulation = layers.gathered(width, 2 * width)
        self.out = nn.Linear(width, outputs)

    def forward(self, z_SBD: Tensor, embedding_BD: Tensor) -> Tensor:
        shift_BD, scale_BD = self.modulation(F.silu(embedding_BD)).chunk(2, dim=-1)
        return self.out(modulated_norm(z_SBD, shift_BD, scale_BD))


class DiffusionTransformer(nn.Module):
    """DiT (arXiv 2212.09748) with the residual structure of the configuration; `adaln_zero` is DiT itself.

    The hidden states z (residual stream) are [S, B, D], tokens first, in `residual_dtype`; branches compute in the
    dtype of their weights. `embed`, each of `blocks`, and `unembed` are separate steps, so that pipeline stages can
    hold them; with a `part` the model has only some of them, with the parameter names of the full model.
    """

    pos_spatial: Tensor
    pos_temporal: Tensor

    def __init__(
        self,
        config: ModelConfig,
        layers: LayerFactory,
        part: ModelPart | None = None,
        residual_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config, self.layers = config, layers
        self.residual_dtype = residual_dtype
        part = part or ModelPart.full(config)
        self.tables = _position_tables(config, part)
        self.set_positions()
        if part.embeds:
            self._build_embeddings()
        self.blocks = nn.ModuleDict({str(i): Block(config, layers, i) for i in part.blocks})
        if part.unembeds:
            channels = config.input.channels * (2 if config.learned_variance else 1)
            self.head = Head(config.hidden_size, channels * math.prod(config.patch_size), layers)

    def _build_embeddings(self) -> None:
        config = self.config
        size, width = config.input, config.hidden_size
        self.patch_embed = nn.Linear(size.channels * math.prod(config.patch_size), width)
        self.timestep_embed = TimestepEmbedding(width, config.timestep_spacing)
        self.class_embed = nn.Embedding(config.num_classes + 1, width) if config.condition == "class" else None
        self.text_embed = PooledEmbedding(config.text.pooled_width, width) if config.condition == "text" else None

    def set_positions(self, device: torch.device | None = None) -> None:
        """Compute the fixed position tables that this part of the model uses, on `device` (default: torch's)."""
        (t, h, w), size, width = self.config.patch_size, self.config.input, self.config.hidden_size
        with torch.device(device or torch.get_default_device()):
            if "pos_spatial" in self.tables:
                self.register_buffer("pos_spatial", spatial_positions(width, size.height // h, size.width // w), False)
            if "pos_temporal" in self.tables:
                self.register_buffer("pos_temporal", temporal_positions(width, size.frames // t), False)

    def forward(self, latents: Tensor, timesteps: Tensor, condition: Condition = None) -> Tensor:
        """Predict noise or velocity.

        Args:
            latents: [B, C, T, H, W], normalized and noised; of any size that the patch size divides.
            timesteps: [B], 0 to 1000 (flow: 1000 * t).
            condition: int64 labels [B], `num_classes` being the null class; a TextCondition; or None, as
                `model.condition` says.

        Returns:
            [B, C, T, H, W] in fp32, or [B, 2C, T, H, W] with learned variance.
        """
        z_SBD, conditioning = self.embed(latents, timesteps, condition)
        z_SBD = self.run_blocks(map(int, self.blocks), z_SBD, conditioning)
        return self.unembed(z_SBD, conditioning, latents.shape[2:])

    def embed(self, latents: Tensor, timesteps: Tensor, condition: Condition) -> tuple[Tensor, Conditioning]:
        """Initial hidden states [S, B, D] of this rank's tokens, and the conditioning of the blocks."""
        grid = self.config.grid_of(latents.shape[2:])
        tokens = patchify(latents, self.config.patch_size).to(self.patch_embed.weight.dtype)
        z_SBD = self.patch_embed(tokens).to(self.residual_dtype)
        if "pos_spatial" in self.tables:
            z_SBD = z_SBD + self.position_embedding(grid).to(self.residual_dtype)[:, None]
        embedding_BD = self.timestep_embed(timesteps)
        if self.class_embed is not None:
            embedding_BD = embedding_BD + self.class_embed(condition)
        text = condition if isinstance(condition, TextCondition) else None
        if self.text_embed is not None:
            assert text is not None, "a model with text condition takes a TextCondition"
            embedding_BD = embedding_BD + self.text_embed(text.pooled)
        return self.layers.split_tokens(z_SBD), self.conditioning(embedding_BD, grid, text)

    def conditioning(
        self, embedding_BD: Tensor, grid: tuple[int, int, int], text: TextCondition | None = None
    ) -> Conditioning:
        """Conditioning of the blocks for samples with `grid` tokens along T, H and W."""
        config, rope = self.config, None
        if config.positions == "rotary":
            rope = table_on(embedding_BD.device, axial_rope, config.head_size, grid, config.input.frames > 1)
        return Conditioning(embedding_BD, grid, text, rope)

    def run_blocks(
        self,
        numbers: Iterable[int],
        z_SBD: Tensor,
        conditioning: Conditioning,
        skips: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """Hidden states after the blocks `numbers`.

        Args:
            skips: long skips by the number of the block whose output they are. Blocks remove those that they consume
                and add those that they start.
        """
        skips = {} if skips is None else skips
        for i in numbers:
            if i == 1 and self.config.attention == "factorized":
                z_SBD = self._add_temporal_positions(z_SBD, conditioning.grid)
            source = self.config.skip_source(i)
            z_SBD = self.blocks[str(i)](z_SBD, conditioning, None if source is None else skips.pop(source))
            if self.config.starts_skip(i):
                skips[i] = z_SBD
        return z_SBD

    def unembed(self, z_SBD: Tensor, conditioning: Conditioning, size: Sequence[int]) -> Tensor:
        """Prediction in fp32 from the last hidden states, for latents of size (T, H, W)."""
        tokens = self.head(self.layers.join_tokens(z_SBD), conditioning.embedding).float()
        return unpatchify(tokens, self.config.patch_size, size)

    def position_embedding(self, grid: tuple[int, int, int]) -> Tensor:
        """Position embedding [S, D] of the patch embedding: spatial and, with joint attention, temporal."""
        spatial = self._spatial(grid).expand(grid[0], -1, -1)
        if "pos_temporal" in self.tables and self.config.attention == "joint":
            spatial = spatial + self._temporal(grid)[:, None]
        return spatial.flatten(0, 1)

    def _add_temporal_positions(self, z_SBD: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Add the frames' positions, with factorized attention before the first temporal block (Latte)."""
        if "pos_temporal" not in self.tables:
            return z_SBD
        temporal_SD = self._temporal(grid).repeat_interleave(grid[1] * grid[2], dim=0)
        return z_SBD + self.layers.split_tokens(temporal_SD[:, None].to(z_SBD.dtype))

    def _spatial(self, grid: tuple[int, int, int]) -> Tensor:
        """Spatial positions [H * W, D], counted from the corner; the stored table serves the configured size only."""
        if grid[1:] == self.config.grid[1:]:
            return self.pos_spatial
        return table_on(self.pos_spatial.device, spatial_positions, self.config.hidden_size, *grid[1:])

    def _temporal(self, grid: tuple[int, int, int]) -> Tensor:
        """Temporal positions [T, D], counted from the first frame; as `_spatial`."""
        if grid[0] == self.config.grid[0]:
            return self.pos_temporal
        return table_on(self.pos_temporal.device, temporal_positions, self.config.hidden_size, grid[0])


def _position_tables(config: ModelConfig, part: ModelPart) -> set[str]:
    """Names of the position tables that a part of a model uses."""
    if config.positions == "rotary":
        return set()
    tables = {"pos_spatial"} if part.embeds else set()
    temporal = 1 in part.blocks if config.attention == "factorized" else part.embeds
    return tables | ({"pos_temporal"} if temporal and config.input.frames > 1 else set())


def build_model(
    config: ModelConfig,
    seed: int = 0,
    layers: LayerFactory | None = None,
    part: ModelPart | None = None,
    residual_dtype: torch.dtype = torch.float32,
) -> DiffusionTransformer:
    """Build the model of a configuration, or a part of it, with the initial values of `seed`.

    On the meta device (`with torch.device("meta")`) parameters have shapes but no values.
    """
    model = DiffusionTransformer(config, layers or LayerFactory(), part, residual_dtype)
    if not next(model.parameters()).is_meta:
        initialize(model, seed, config)
    return model
