"""The part of a model that one rank of the pipeline holds: its chunks, built in place, behind one forward."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from rdm_scale.conditions import Condition, TextCondition
from rdm_scale.config import ModelConfig, RunConfig
from rdm_scale.dtypes import PRECISIONS
from rdm_scale.models import DiffusionTransformer, ModelPart
from rdm_scale.models.initialization import initialize
from rdm_scale.models.layers import LayerFactory
from rdm_scale.parallel.mesh import Mesh
from rdm_scale.parallel.plan import Layout


class Stage(DiffusionTransformer):
    """All chunks of a rank: one module, because one ZeRO engine must hold all of a rank's parameters.

    The condition travels with the stream: it is [B, D] against the stream's [S, B, D], 1/S more traffic. Computing it
    again on every stage would need the embedders' parameters there, and their gradients summed over the pipeline.
    """

    def __init__(
        self, config: ModelConfig, layers: LayerFactory, parts: dict[int, ModelPart], residual_dtype: torch.dtype
    ) -> None:
        held = ModelPart(
            tuple(block for part in parts.values() for block in part.blocks),
            embeds=any(part.embeds for part in parts.values()),
            unembeds=any(part.unembeds for part in parts.values()),
        )
        super().__init__(config, layers, held, residual_dtype)
        self.parts = parts

    def forward(self, chunk: int, size: Sequence[int], condition: Condition, *inputs: Any) -> Any:  # type: ignore[override]
        """(stream, condition vectors) to the same, for chunk number `chunk` and latents of size (T, H, W); the first
        chunk takes (latents, timesteps), as the whole model does, the last one returns the prediction. The condition
        itself, which all ranks of a replica have, is given to every chunk: blocks attend to the caption's tokens.

        What comes after the condition vectors are long skips to blocks of this chunk, or from them, in the order of
        the blocks that they start from.
        """
        part = self.parts[chunk]
        sources = [self.config.skip_source(block) for block in part.blocks]
        ends = sorted(source for source in sources if source is not None and source not in part.blocks)
        skips = dict(zip(ends, inputs[2:], strict=True)) if chunk else {}
        if part.embeds:
            latents, timesteps = inputs
            z_SBD, conditioning = self.embed(latents, timesteps, condition)
        else:
            text = condition if isinstance(condition, TextCondition) else None
            z_SBD, conditioning = inputs[0], self.conditioning(inputs[1], self.config.grid_of(size), text)
        z_SBD = self.run_blocks(part.blocks, z_SBD, conditioning, skips)
        if part.unembeds:
            return self.unembed(z_SBD, conditioning, size)
        # Its gradient adds up on the way back through the stages.
        condition_BD = conditioning.embedding.view_as(conditioning.embedding)
        return z_SBD, condition_BD, *(skip for _, skip in sorted(skips.items()))


def build_stage(config: RunConfig, mesh: Mesh, layout: Layout, layers: LayerFactory) -> Stage:
    """This rank's stage on the meta device: shapes, but no values."""
    place = layout.placement
    parts = {
        chunk: ModelPart(tuple(layout.blocks[chunk]), embeds=chunk == 0, unembeds=chunk == place.chunks - 1)
        for chunk in place.chunks_of(mesh.pipeline_rank)
    }
    with torch.device("meta"):
        return Stage(config.model, layers, parts, PRECISIONS[config.train.residual_dtype].torch)


def materialize(stage: Stage, config: RunConfig, device: torch.device) -> Iterator[nn.Module]:
    """Gives the parameters their initial values, a block at a time, and yields each module that has become real; who
    shards it before the next one keeps no more than one block whole."""
    stage.set_positions(device)
    for name, module in _units(stage):
        for owner in module.modules():
            for leaf, parameter in list(owner._parameters.items()):
                if parameter is not None:
                    real = nn.Parameter(torch.empty_like(parameter, device=device))
                    real.__dict__.update(parameter.__dict__)  # what it is a slice of
                    owner._parameters[leaf] = real
        initialize(module, config.train.seed, config.model, prefix=f"{name}.")
        yield module


def _units(stage: Stage) -> Iterable[tuple[str, nn.Module]]:
    for name, child in stage.named_children():
        if name == "blocks":
            yield from ((f"blocks.{i}", block) for i, block in child.named_children())
        else:
            yield name, child
