"""The replay of benchmarks/overlap.py, on steps that can be worked out by hand."""

import pytest

from benchmarks.overlap import Link, Part, Sizes, Stage, bucketed, replay, replay_serial, stage_of_rank
from rdm_scale.config import load_config
from rdm_scale.cost import model_flops, model_parameters

# Two blocks whose parameters are gathered in 1 s and whose gradients are reduced in 2 s, on a link of 1 byte/s between
# ranks so many that (n - 1) / n is 1; forwards of 3 s, backwards of 6 s.
SIZES = Sizes(parameter=1, gradient=2)
BLOCKS = [Part(3.0, 6.0, 1), Part(3.0, 6.0, 1)]
FAST = Link(ranks=2**40, bytes_per_s=1.0)


def test_a_serial_step_is_a_sum() -> None:
    """Gather 2 s, and 1 s for what is outside of the blocks, forwards 6, backwards 12, reduce 4 and 2."""
    replayed = replay_serial(Stage(BLOCKS, 1), 1, FAST, SIZES)
    assert replayed == pytest.approx((27.0, 18.0)) and replayed.exposed == pytest.approx(1 / 3)


def test_buckets_expose_the_first_gather_and_the_last_reduction() -> None:
    """The first bucket is there at 1, the second at 2, before the first forward ends at 4. Forwards end at 7, backwards
    at 13 and 19; the reduction of the second bucket runs from 13 to 15, that of the first from 19 to 21.
    """
    assert replay([BLOCKS[:1], BLOCKS[1:]], 0, 1, FAST, SIZES) == pytest.approx((21.0, 18.0))


def test_a_slow_link_is_the_bound() -> None:
    """With 10 s a gather, 20 a reduction: forwards from 10 to 13 and 20 to 23, backwards until 29 and 35; the link
    reduces from 29 to 49 and from 49 to 69.
    """
    slow = FAST._replace(bytes_per_s=0.1)
    assert replay([BLOCKS[:1], BLOCKS[1:]], 0, 1, slow, SIZES) == pytest.approx((69.0, 18.0))


def test_backwards_run_from_the_last_bucket_to_the_first() -> None:
    """Gathered at 3 and 4; forwards from 3 to 4 and 4 to 6; the backward of the last bucket until 10, its reduction
    until 12; that of the first until 12, and its reduction of 6 s until 18.
    """
    first, last = Part(1.0, 2.0, 3), Part(2.0, 4.0, 1)
    assert replay([[first], [last]], 0, 1, FAST, SIZES) == pytest.approx((18.0, 9.0))


def test_what_is_outside_of_the_blocks_comes_first_and_last() -> None:
    """Gathered until 2, then the blocks until 3 and 4; forwards end at 6 and 9, backwards at 15 and 21, the reduction
    of the first block at 23 and that of what is outside at 27.
    """
    assert replay([BLOCKS[:1], BLOCKS[1:]], 2, 1, FAST, SIZES) == pytest.approx((27.0, 18.0))


def test_a_reduction_waits_for_a_gather_that_is_under_way() -> None:
    """A last block without computation, gathered from 1 to 5: its backward ends at once, and it reduces until 13."""
    first, last = Part(0.0, 0.0, 1), Part(0.0, 0.0, 4)
    assert replay([[first], [last]], 0, 1, FAST, SIZES) == pytest.approx((15.0, 0.0))


def test_more_micro_batches_compute_more_and_send_the_same() -> None:
    one, three = (replay([BLOCKS[:1], BLOCKS[1:]], 0, count, FAST, SIZES) for count in (1, 3))
    assert (three.seconds - one.seconds, three.computed_s - one.computed_s) == pytest.approx((36.0, 36.0))


def test_duration_of_a_collective() -> None:
    """4 ranks: three quarters of 8 bytes at 2 byte/s, and two hops of 5 s. A single rank sends nothing."""
    assert Link(4, 2.0, 5.0).seconds(8) == pytest.approx(13.0)
    assert Link(1, 2.0, 5.0).seconds(8) == 0.0


def test_buckets_keep_the_order_and_have_so_many_parameters_at_most() -> None:
    blocks = [Part(0.0, 0.0, count) for count in (3, 1, 1, 5, 1)]
    assert [[block.parameters for block in bucket] for bucket in bucketed(blocks, 4)] == [[3, 1], [1], [5], [1]]
    assert bucketed(blocks, 0.5) == [[block] for block in blocks] and bucketed(blocks, 100) == [blocks]


def test_the_stage_of_a_single_pipeline_rank_is_the_model() -> None:
    config = load_config("configs/dit_xl.yaml")
    stage = stage_of_rank(config, 32, rate=1e12, data_only=True)
    assert len(stage.blocks) == config.model.depth
    parameters = stage.outside + sum(block.parameters for block in stage.blocks)
    assert parameters == model_parameters(config.model).total
    assert sum(block.forward_s for block in stage.blocks) == pytest.approx(32 * model_flops(config.model) / 1e12)


def test_a_rank_of_a_tensor_and_pipeline_layout_holds_a_part_of_the_model() -> None:
    """A quarter of what is sharded in half of the blocks: 1.0 of 8.0 billion parameters, an eighth of the time."""
    config = load_config("configs/depth_8b.yaml")
    stage = stage_of_rank(config, 8, rate=1e12, data_only=False)
    parameters = stage.outside + sum(block.parameters for block in stage.blocks)
    assert len(stage.blocks) == 53
    assert parameters == pytest.approx(model_parameters(config.model).total / 8, rel=0.02)
    seconds = sum(block.forward_s for block in stage.blocks)
    assert seconds == pytest.approx(8 * model_flops(config.model) / 8 / 1e12, rel=0.02)
