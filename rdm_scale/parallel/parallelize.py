"""The one place where a plain model becomes a parallel one."""

from collections.abc import Callable

import torch
from torch import nn

from rdm_scale.config import RunConfig
from rdm_scale.models import DiffusionTransformer
from rdm_scale.models.blocks import Block
from rdm_scale.parallel.mesh import Mesh
from rdm_scale.parallel.recompute import recompute_blocks
from rdm_scale.parallel.zero import ZeroEngine

_RESIDUAL_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parallelize(
    model: DiffusionTransformer,
    config: RunConfig,
    mesh: Mesh,
    build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
) -> ZeroEngine:
    """Spreads an initialised model over the mesh. The configuration has checked that the layout is supported."""
    recompute_blocks(model.blocks, config.parallel.recompute)
    model.residual_dtype = _RESIDUAL_DTYPES[config.train.residual_dtype]
    return ZeroEngine(model.to(mesh.device), config, mesh, build_optimizer, leaves=[Block])
