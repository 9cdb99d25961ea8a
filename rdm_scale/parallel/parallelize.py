"""The one place where a plain model becomes a parallel one."""

from collections.abc import Callable

import torch
from torch import nn

from rdm_scale.config import RunConfig
from rdm_scale.models.blocks import Block
from rdm_scale.models.layers import LayerFactory
from rdm_scale.parallel.attention_kernels import choose_attention_kernel
from rdm_scale.parallel.compile import CompiledBlocks, Report, wants_compilation
from rdm_scale.parallel.cuda_graphs import MicroBatchGraphs, wants_graphs
from rdm_scale.parallel.host_memory import returning_freed_memory
from rdm_scale.parallel.mesh import Mesh
from rdm_scale.parallel.parallel_model import ParallelModel
from rdm_scale.parallel.plan import ParallelPlan
from rdm_scale.parallel.recompute import checkpoint_activations
from rdm_scale.parallel.stage import build_stage, materialize
from rdm_scale.parallel.zero.engine import ZeroEngine
from rdm_scale.parallel.zero.stage3 import Zero3
from rdm_scale.parallel.zero.stage3_gathered import Zero3Gathered
from rdm_scale.parallel.zero.stages012 import Zero012


def parallelize(
    config: RunConfig,
    mesh: Mesh,
    plan: ParallelPlan,
    build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    report: Report = print,
) -> ParallelModel:
    """Build this rank's part of a model, initialized and ready to train.

    Tensor parallelism chooses the layers, the pipeline the blocks of this rank's stage, activation checkpointing and
    compilation wrap the blocks, and ZeRO shards parameters as they are materialized, one block after the other.

    Args:
        build_optimizer: makes the optimizer of a stage's parameters.
        report: is given lines for the user, such as what is compiled; on rank 0 only.
    """
    report = report if mesh.is_first else _silent
    choose_attention_kernel(config, plan.micro_batch, mesh, report)
    layers = LayerFactory()
    if mesh.tensor_size > 1:
        from rdm_scale.parallel.tensor import TensorParallelLayers

        layers = TensorParallelLayers(mesh, config.parallel.sequence)
    stage = build_stage(config, mesh, plan, layers)
    compiled = None
    if wants_compilation(config, mesh.device, report):
        compiled = CompiledBlocks(stage.blocks.values(), config, report)
    else:
        checkpoint_activations(stage.blocks.values(), config.parallel.recompute)
    engine_class: type[ZeroEngine] = Zero012
    if config.parallel.zero_stage == 3:
        engine_class = Zero3Gathered if plan.keep_gathered else Zero3
    with returning_freed_memory():
        modules = materialize(stage, config, mesh.device)
        engine = engine_class(stage, modules, config, mesh, plan, build_optimizer, leaf_type=Block)
        graphs = None
        if wants_graphs(config, mesh, plan, report):
            assert isinstance(engine, Zero3Gathered)
            graphs = MicroBatchGraphs(engine, config.train.compile_shapes, report, config.train.cuda_graphs == "true")
        return ParallelModel(config, mesh, plan, engine, compiled, graphs)


def _silent(line: str) -> None:
    """Drop a line: other ranks than the first report nothing."""
