"""ZeRO-3 on 1, 2 and 4 ranks against a plain PyTorch loop on one process."""

from pathlib import Path

import pytest

from tests.support.rank_pool import RankPool
from tests.support.reference import Reference, deviation, plain_training
from tests.support.small_runs import metrics, run_config, train, write_latents


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_latents(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="module")
def reference(data: str, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return plain_training(run_config(tmp_path_factory.mktemp("reference"), data, optimizer__grad_clip=1.0))


@pytest.mark.parametrize(("world", "micro"), [(1, None), (1, 2), (2, None), (4, None), (4, 1)])
def test_every_number_of_ranks_trains_the_same_model(
    ranks: RankPool, reference: Reference, data: str, tmp_path: Path, world: int, micro: int | None
) -> None:
    config = run_config(tmp_path, data, optimizer__grad_clip=1.0, train__micro_batch_size=micro)
    ranks.run(world, train, config)
    assert max(reference.norms) > 1.0 > min(reference.norms), "gradients must be clipped in some steps, but not in all"
    worst = deviation(config, reference)
    print(f"worst relative deviation on {world} ranks, micro-batch {micro}: {worst}")
    worst.check()


@pytest.mark.parametrize("recompute", ["full", "selective", "every_2"])
def test_activation_checkpointing_changes_nothing_under_zero(
    ranks: RankPool, reference: Reference, data: str, tmp_path: Path, recompute: str
) -> None:
    config = run_config(
        tmp_path, data, optimizer__grad_clip=1.0, parallel__recompute=recompute, train__micro_batch_size=2
    )
    ranks.run(2, train, config)
    for record, loss, norm in zip(metrics(config.run.dir), reference.losses, reference.norms, strict=True):
        assert (record["loss"], record["grad_norm"]) == pytest.approx((loss, norm), rel=1e-5)


@pytest.mark.parametrize(
    ("world", "stage", "keep_gathered"),
    [
        (1, 3, "always"),
        (2, 3, "always"),
        (2, 3, "never"),
        (1, 1, "auto"),
        (2, 0, "auto"),
        (2, 1, "auto"),
        (2, 2, "auto"),
    ],
)
def test_bf16_stays_close_to_fp32(
    ranks: RankPool, reference: Reference, data: str, tmp_path: Path, world: int, stage: int, keep_gathered: str
) -> None:
    changes = {"train__precision": "bf16", "parallel__keep_gathered": keep_gathered, "parallel__zero_stage": stage}
    changes["parallel__reduce_dtype"] = "bf16"
    config = run_config(tmp_path, data, optimizer__grad_clip=1.0, train__micro_batch_size=2, **changes)
    ranks.run(world, train, config)
    for record, loss, norm in zip(metrics(config.run.dir), reference.losses, reference.norms, strict=True):
        assert (record["loss"], record["grad_norm"]) == pytest.approx((loss, norm), rel=0.02)
