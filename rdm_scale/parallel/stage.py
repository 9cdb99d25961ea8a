"""Pipeline stage: the chunks of a model that one rank of the pipeline holds.

Shapes: S tokens, B samples, D hidden size.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from rdm_scale.batch import ModelInputs
from rdm_scale.conditions import TextCondition
from rdm_scale.config import ModelConfig, RunConfig
from rdm_scale.dtypes import PRECISIONS
from rdm_scale.models import DiffusionTransformer, ModelPart
from rdm_scale.models.initialization import initialize
from rdm_scale.models.layers import LayerFactory
from rdm_scale.parallel.mesh import Mesh
from rdm_scale.parallel.pipeline.boundary import BoundaryTensors, StageInputs, StageOutputs
from rdm_scale.parallel.plan import ParallelPlan


class Stage(DiffusionTransformer):
    """Chunks of a rank in one module, because one ZeRO engine must hold all of a rank's parameters."""

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
        self._received_skips = {chunk: _received_skips(config, part) for chunk, part in parts.items()}

    def forward(self, chunk: int, model_inputs: ModelInputs, inputs: StageInputs) -> StageOutputs:  # type: ignore[override]
        """Run one chunk.

        Args:
            model_inputs: inputs of the entire model, which every rank of a model replica has. The first chunk embeds
                them, the others use only their size and the caption's tokens.
            inputs: outputs of other chunks. Local skips are in the order of the blocks whose output they are.
        """
        part, size = self.parts[chunk], model_inputs.latents.shape[2:]
        skips = dict(zip(self._received_skips[chunk], inputs.local_skips, strict=True))
        if inputs.boundary is None:
            z_SBD, conditioning = self.embed(*model_inputs)
        else:
            text = model_inputs.condition if isinstance(model_inputs.condition, TextCondition) else None
            z_SBD, embedding_BD = inputs.boundary
            conditioning = self.conditioning(embedding_BD, self.config.grid_of(size), text)
        z_SBD = self.run_blocks(part.blocks, z_SBD, conditioning, skips)
        if part.unembeds:
            return StageOutputs(prediction=self.unembed(z_SBD, conditioning, size))
        # A view, so that its gradient adds up on the way back through the stages.
        embedding_BD = conditioning.embedding.view_as(conditioning.embedding)
        return StageOutputs(BoundaryTensors(z_SBD, embedding_BD), tuple(skip for _, skip in sorted(skips.items())))


def _received_skips(config: ModelConfig, part: ModelPart) -> list[int]:
    """Blocks of other chunks at which long skips to blocks of this chunk start, in order."""
    sources = (config.skip_source(block) for block in part.blocks)
    return sorted(source for source in sources if source is not None and source not in part.blocks)


def build_stage(config: RunConfig, mesh: Mesh, plan: ParallelPlan, layers: LayerFactory) -> Stage:
    """Build this rank's stage on the meta device: shapes, but no values."""
    placement = plan.placement
    parts = {
        chunk: ModelPart(tuple(plan.blocks[chunk]), embeds=chunk == 0, unembeds=chunk == placement.last_chunk)
        for chunk in placement.chunks_of(mesh.pipeline_rank)
    }
    with torch.device("meta"):
        return Stage(config.model, layers, parts, PRECISIONS[config.train.residual_dtype].torch)


def materialize(stage: Stage, config: RunConfig, device: torch.device) -> Iterator[nn.Module]:
    """Allocate and initialize the parameters, one block (or other child) at a time.

    Yields:
        Each module after its materialization. A caller that shards it before it takes the next one never holds more
        than one unsharded block.
    """
    stage.set_positions(device)
    for name, module in _modules_to_materialize(stage):
        module.to_empty(device=device)
        initialize(module, config.train.seed, config.model, prefix=f"{name}.")
        yield module


def _modules_to_materialize(stage: Stage) -> Iterable[tuple[str, nn.Module]]:
    for name, child in stage.named_children():
        if name == "blocks":
            yield from ((f"blocks.{i}", block) for i, block in child.named_children())
        else:
            yield name, child
