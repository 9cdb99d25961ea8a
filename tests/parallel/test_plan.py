"""Plan of a layout: balance of the stages, memory, automatic choices and the printed table."""

import itertools

import pytest

from rdm_scale import cost
from rdm_scale.config import RunConfig, parse_config
from rdm_scale.errors import ConfigError
from rdm_scale.parallel.pipeline.schedules import place_chunks
from rdm_scale.parallel.plan import StageCost, balance, plan_parallelism

GIB = 2**30


def run(depth: int = 12, **sections: dict) -> RunConfig:
    tree = {"model": {"depth": depth}, "data": {"train": "x"}, "run": {"dir": "x"}, "train": {}} | sections
    return parse_config(tree, "the test")


def rank_costs(config: RunConfig, schedule: str, p: int, v: int) -> list[float]:
    place = place_chunks(schedule, p, v)
    sizes = [len(part) for part in balance(config, place)]
    costs = [size * cost.block_flops(config.model) for size in sizes]
    costs[0] += cost.embedding_flops(config.model)
    costs[-1] += cost.head_flops(config.model)
    return [sum(costs[chunk] for chunk in place.chunks_of(rank)) for rank in range(p)]


def test_each_block_is_assigned_once_and_in_order() -> None:
    for p, v, schedule in ((1, 1, "1f1b"), (4, 1, "1f1b"), (3, 2, "v_1f1b"), (2, 3, "interleaved_1f1b")):
        blocks = balance(run(13), place_chunks(schedule, p, v))
        assert list(itertools.chain(*blocks)) == list(range(13)) and min(map(len, blocks)) >= 1


@pytest.mark.parametrize(("depth", "p"), [(5, 2), (7, 3), (9, 4), (12, 5)])
def test_no_other_partition_has_a_cheaper_costliest_stage(depth: int, p: int) -> None:
    """Compare with all partitions of the blocks into stages, with a head that costs as much as several blocks."""
    size = {"hidden_size": 32, "num_heads": 4, "patch_size": [1, 8, 8], "input": {"channels": 64}}
    config = run(model={"depth": depth, **size, "learned_variance": True}, diffusion={"objective": "ddpm"})
    assert cost.head_flops(config.model) > 2 * cost.block_flops(config.model)
    block, first = cost.block_flops(config.model), cost.embedding_flops(config.model)
    best = min(
        max(
            (b - a) * block + (a == 0) * first + (b == depth) * cost.head_flops(config.model)
            for a, b in itertools.pairwise((0, *cuts, depth))
        )
        for cuts in itertools.combinations(range(1, depth), p - 1)
    )
    assert max(rank_costs(config, "1f1b", p, 1)) == pytest.approx(best)


def test_v_placement_balances_ranks() -> None:
    costs = rank_costs(run(20), "v_1f1b", 4, 2)  # 5 blocks a rank, in two chunks
    assert max(costs) - min(costs) < cost.block_flops(run().model)


@pytest.mark.parametrize(("depth", "p"), [(8, 2), (9, 2), (21, 4), (6, 3), (7, 3)])
def test_both_ends_of_a_long_skip_are_on_one_rank(depth: int, p: int) -> None:
    config = run(model={"depth": depth, "stacking": "u"})
    place = place_chunks("v_1f1b", p, 2)
    blocks = balance(config, place)
    rank_of = {block: place.rank_of(chunk) for chunk, part in enumerate(blocks) for block in part}
    assert [*rank_of] == list(range(depth))
    assert all(rank_of[block] == rank_of[depth - 1 - block] for block in range(depth))
    on_ranks = [sum(rank_of[block] == rank for block in range(depth)) for rank in range(p)]
    assert max(on_ranks) - min(on_ranks) <= 2


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b"])
def test_long_skips_need_v_placement(schedule: str) -> None:
    with pytest.raises(ConfigError, match=r"stacking=u with parallel\.pipeline=2 needs parallel\.schedule=v_1f1b"):
        run(model={"depth": 8, "stacking": "u"}, parallel={"pipeline": 2, "schedule": schedule})


def test_planned_memory_equals_a_count_by_hand() -> None:
    """DiT-S on 4 ranks, ZeRO-1, fp32: parameters and gradients unsharded, optimizer (12 bytes) and EMA (4) sharded."""
    config = run(parallel={"zero_stage": 1}, train={"global_batch_size": 8})
    n = cost.model_parameters(config.model).total
    layout = plan_parallelism(config, 4, None)
    (stage,) = layout.stages
    assert stage.parameters == n and (layout.micro_batch, layout.micro_batches) == (2, 1)
    assert (stage.state.parameters, stage.state.gradients) == (4 * n, 4 * n)
    assert stage.state.optimizer == 12 * -(-n // 4) and stage.state.ema == 4 * -(-n // 4)
    assert stage.activations == 12 * cost.block_activation_bytes(config, 2, "none")


def test_early_stages_keep_more_activations() -> None:
    config = run(parallel={"pipeline": 4}, train={"global_batch_size": 16, "micro_batch_size": 2})
    layout = plan_parallelism(config, 4, None)
    one = 3 * cost.block_activation_bytes(config, 2, "none")
    assert [stage.activations for stage in layout.stages] == [one * kept for kept in (4, 3, 2, 1)]
    assert layout.bubble == pytest.approx(3 / (8 + 3), rel=0.02)  # the formula ignores embedding and head


def test_recompute_and_sequence_parallelism_save_activations() -> None:
    def bytes_with(**parallel: object) -> float:
        return plan_parallelism(run(parallel=parallel, train={"global_batch_size": 8}), 2, None).stages[0].activations

    plain = bytes_with(tensor=2)
    assert bytes_with(tensor=2, sequence=True) < 0.75 * plain
    assert bytes_with(tensor=2, recompute="full") < bytes_with(tensor=2, recompute="selective") < plain
    assert plain < 2 * bytes_with()  # each of two data-parallel ranks has half the batch


def test_auto_gathers_once_a_step_when_memory_allows() -> None:
    config = run(train={"global_batch_size": 8})
    needed = (
        plan_parallelism(run(train={"global_batch_size": 8}, parallel={"keep_gathered": "always"}), 4, None)
        .stages[0]
        .total
    )
    assert plan_parallelism(config, 4, needed / 0.89).keep_gathered
    assert not plan_parallelism(config, 4, needed / 0.91).keep_gathered
    assert not plan_parallelism(run(parallel={"keep_gathered": "never"}), 4, 1e15).keep_gathered
    assert not plan_parallelism(run(parallel={"zero_stage": 2}), 4, 1e15).keep_gathered


def test_the_table_shows_the_plan_and_warns() -> None:
    config = run(parallel={"tensor": 2, "pipeline": 2}, train={"global_batch_size": 8, "micro_batch_size": 1})
    text = plan_parallelism(config, 8, 0.001 * GIB).table(config)
    assert "8 ranks = tensor 2 x pipeline 2 x data 2; ZeRO stage 3, parameters gathered by block" in text
    assert "8 samples = 2 x 4 micro-batches of 1" in text and "predicted bubble 2" in text
    assert "warning: a rank needs" in text and "parallel.recompute=full" in text
    assert "warning" not in plan_parallelism(config, 8, 100 * GIB).table(config)
    assert "set parallel.memory_gib" in plan_parallelism(config, 8, None).table(config)


def test_a_hundred_billion_parameters_on_thousands_of_ranks() -> None:
    config = parse_config(
        {
            "model": {"depth": 80, "hidden_size": 8192, "num_heads": 64},
            "parallel": {"tensor": 8, "pipeline": 16, "sequence": True, "recompute": "selective"},
            "train": {"global_batch_size": 4096, "micro_batch_size": 1, "precision": "bf16"},
            "data": {"train": "x"},
            "run": {"dir": "x"},
        },
        "the test",
    )
    layout = plan_parallelism(config, 4096, 80 * GIB)
    assert sum(len(blocks) for blocks in layout.blocks) == 80 and layout.data == 32
    assert 8 * sum(stage.parameters for stage in layout.stages) == pytest.approx(96.9e9, rel=0.01)
    assert "..." in layout.table(config)


def test_a_world_size_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel.tensor x parallel.pipeline = 4 does not divide the 6 ranks"):
        plan_parallelism(run(parallel={"tensor": 2, "pipeline": 2}), 6, None)


def test_states_are_sharded_over_a_group_and_copied_between_groups() -> None:
    def plan(**parallel: object) -> StageCost:
        config = run(train={"global_batch_size": 8}, parallel={"keep_gathered": "never", **parallel})
        return plan_parallelism(config, 8, None).stages[0]

    alone = plan_parallelism(run(train={"global_batch_size": 8}, parallel={"keep_gathered": "never"}), 2, None).stages[
        0
    ]
    assert plan(shard_size=2).state == alone.state and plan(shard_size=8) == plan()
    with pytest.raises(ConfigError, match=r"shard_size=3 does not divide the number of data-parallel ranks, 8"):
        plan(shard_size=3)


def test_an_offloaded_optimizer_is_in_host_memory() -> None:
    config = run(train={"global_batch_size": 8}, parallel={"offload": "optimizer"})
    layout = plan_parallelism(config, 8, 1.0)
    state = layout.stages[0].state
    assert layout.keep_gathered and (state.optimizer, state.ema) == (0, 0)
    assert state.host == 20 * -(-layout.stages[0].parameters // 8)
    assert "in host memory at most" in layout.table(config)
