"""Python calls of a step beside those of the blocks: as many for 64 blocks and 4,096 ranks as for 8 and 2."""

import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from rdm_scale.config import RunConfig
from tests.support.rank_pool import RankPool
from tests.support.small_runs import run_config

if TYPE_CHECKING:
    from rdm_scale.parallel.mesh import Mesh


def simulated_mesh(data: int) -> "Mesh":
    """Mesh of the first of `data` data-parallel ranks, of which the others do not exist: collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from rdm_scale.parallel.hosts import Hosts
    from rdm_scale.parallel.megatron_adapter import AxisGroup, ModelParallelUnit
    from rdm_scale.parallel.mesh import Mesh

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=data)
    everyone, alone = dist.group.WORLD, dist.new_group([0])
    assert everyone is not None and isinstance(alone, dist.ProcessGroup)
    for axis, group in (("model", alone), ("tensor_model", alone)):
        values = {"group": group, "rank": 0, "world_size": dist.get_world_size(group)}
        for what, value in values.items():
            setattr(ModelParallelUnit, f"get_{axis}_parallel_{what}", staticmethod(lambda value=value: value))
    return Mesh(
        rank=0,
        world_size=data,
        tensor_rank=0,
        tensor_size=1,
        tensor_group=alone,
        pipeline_rank=0,
        pipeline_size=1,
        pipeline_group=alone,
        data_rank=0,
        data_size=data,
        data_group=everyone,
        shard=AxisGroup(everyone, 0, data),
        copies=AxisGroup(alone, 0, 1),
        replica_group=alone,
        store=dist.HashStore(),
        hosts=Hosts.of(["here"]),
        device=torch.device("cpu"),
        timeout=timedelta(seconds=60),
    )


def calls_of(action: Callable[[], Any]) -> int:
    """Number of Python functions, and of C functions from Python, that an action calls."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(None)
    return calls


def step_calls(config: RunConfig, data: int) -> int:
    """Calls of the third step of an engine: of all but the forward, with a graph that only C++ runs as the backward."""
    from rdm_scale.models.blocks import Block
    from rdm_scale.models.layers import LayerFactory
    from rdm_scale.parallel.plan import plan_parallelism
    from rdm_scale.parallel.stage import build_stage, materialize
    from rdm_scale.parallel.zero.stage3_gathered import Zero3Gathered
    from rdm_scale.training.optimizer import build_optimizer

    mesh = simulated_mesh(data)
    plan = plan_parallelism(config, data, None)
    stage = build_stage(config, mesh, plan, LayerFactory())
    make_optimizer = partial(build_optimizer, config.optimizer, config.model)
    modules = materialize(stage, config, mesh.device)
    engine = Zero3Gathered(stage, modules, config, mesh, plan, make_optimizer, leaf_type=Block)

    def step(losses: list[torch.Tensor]) -> None:
        with engine.accumulating():
            for loss in losses:
                engine.backward((loss,), (None,))
        engine.step(1e-3)

    calls = 0
    for _ in range(3):
        losses = [sum(parameter.square().sum() for parameter in stage.parameters()) for _ in range(2)]
        calls = calls_of(lambda losses=losses: step(losses))  # type: ignore[misc]
    return calls


def test_calls_of_a_step_do_not_grow_with_blocks_or_ranks(ranks: RankPool, tmp_path: Path) -> None:
    def calls(depth: int, data: int, overlap: bool) -> int:
        changes = {"model__depth": depth, "train__global_batch_size": data, "parallel__overlap": overlap}
        config = run_config(tmp_path, "none", **changes, parallel__keep_gathered="always")
        return int(ranks.run(1, step_calls, config, data)[0])

    counts = [calls(depth, data, overlap=False) for depth, data in ((8, 2), (64, 2), (8, 4096))]
    print(counts)
    assert len(set(counts)) == 1 and counts[0] < 500
    # In buckets, of which every small model has as many. How often a thread is asked whether it is done differs.
    assert calls(64, 4096, overlap=True) < 3 * counts[0]
