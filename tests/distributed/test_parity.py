"""ZeRO-3 on 1, 2 and 4 ranks against a plain PyTorch loop on one process."""

import copy
from pathlib import Path
from typing import Literal

import pytest
import torch
from rank_pool import RankPool
from small_runs import metrics, run_config, train, write_latents
from torch import Tensor

from rdm_scale.checkpoint import load_model
from rdm_scale.config import RunConfig
from rdm_scale.data.prefetch import draw
from rdm_scale.data.stream import LatentStream
from rdm_scale.diffusion import build_objective
from rdm_scale.models import build_model

Reference = tuple[list[float], list[float], dict[str, Tensor], dict[str, Tensor]]


def plain_training(config: RunConfig) -> Reference:
    """Losses, gradient norms, last weights and averaged weights of AdamW as anyone would write it down."""
    options = config.optimizer
    model = build_model(config.model, config.train.seed)
    average = copy.deepcopy(model)
    decayed = [p for n, p in model.named_parameters() if n.endswith("weight") and "class_embed" not in n]
    others = [p for n, p in model.named_parameters() if not (n.endswith("weight") and "class_embed" not in n)]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, foreach=False)
    batches = iter(
        LatentStream(config.data.train, global_batch_size=config.train.global_batch_size, seed=config.train.seed)
    )
    losses, norms = [], []
    for step in range(1, config.train.steps + 1):
        batch = draw(
            next(batches),
            objective=build_objective(config.diffusion, False),
            seed=config.train.seed,
            num_classes=config.model.num_classes,
            condition_dropout=config.diffusion.condition_dropout,
        )
        t = batch.t.view(-1, 1, 1, 1, 1)
        prediction = model((1 - t) * batch.latents + t * batch.noise, 1000 * batch.t, batch.condition)
        loss = ((prediction - (batch.noise - batch.latents)) ** 2).mean()
        adamw.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), options.grad_clip)))
        for group in adamw.param_groups:
            group["lr"] = options.lr * min(1.0, step / options.warmup_steps)
        adamw.step()
        decay = min(options.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
                mean.mul_(decay).add_(weight, alpha=1 - decay)
        losses.append(loss.item())
    return losses, norms, dict(model.named_parameters()), dict(average.named_parameters())


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
    losses, norms, weights, averages = reference
    records = metrics(config.run.dir)
    assert [r["step"] for r in records] == list(range(1, 21))
    assert max(norms) > 1.0 > min(norms), "the reference must clip in some steps and not in others"
    worst = {
        "loss": max(abs(r["loss"] / loss - 1) for r, loss in zip(records, losses, strict=True)),
        "gradient norm": max(abs(r["grad_norm"] / norm - 1) for r, norm in zip(records, norms, strict=True)),
        "weights": largest_distance(config.run.dir, "weights", weights),
        "averages": largest_distance(config.run.dir, "ema", averages),
    }
    print(f"worst relative deviation on {world} ranks, micro-batch {micro}:", {k: f"{v:.1e}" for k, v in worst.items()})
    assert worst["loss"] < 1e-5 and worst["gradient norm"] < 1e-5
    assert worst["weights"] < 1e-4 and worst["averages"] < 1e-4


def largest_distance(run_dir: str, kind: Literal["weights", "ema"], expected: dict[str, Tensor]) -> float:
    """Of all tensors, relative to each one's norm (or to 1e-3 where it is almost nothing: gates and biases at 0)."""
    found = load_model(run_dir, kind).named_parameters()
    distances = {name: (p - expected[name]).norm() / expected[name].norm().clamp(min=1e-3) for name, p in found}
    return max(distance.item() for distance in distances.values())


@pytest.mark.parametrize("recompute", ["full", "selective", "every_2"])
def test_recomputed_activations_change_nothing_under_zero(
    ranks: RankPool, reference: Reference, data: str, tmp_path: Path, recompute: str
) -> None:
    config = run_config(
        tmp_path, data, optimizer__grad_clip=1.0, parallel__recompute=recompute, train__micro_batch_size=2
    )
    ranks.run(2, train, config)
    for record, loss, norm in zip(metrics(config.run.dir), reference[0], reference[1], strict=True):
        assert (record["loss"], record["grad_norm"]) == pytest.approx((loss, norm), rel=1e-5)


def test_bf16_stays_close_to_fp32(ranks: RankPool, reference: Reference, data: str, tmp_path: Path) -> None:
    config = run_config(tmp_path, data, optimizer__grad_clip=1.0, train__precision="bf16")
    ranks.run(2, train, config)
    for record, loss in zip(metrics(config.run.dir), reference[0], strict=True):
        assert record["loss"] == pytest.approx(loss, rel=0.02)
