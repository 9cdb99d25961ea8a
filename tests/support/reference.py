"""Reference training in plain PyTorch on one process, and the deviation of a run from it."""

import copy
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rdm_scale.checkpoint import load_model
from rdm_scale.config import RunConfig
from rdm_scale.data.captions import empty_caption
from rdm_scale.data.manifest import read_manifest
from rdm_scale.data.stream import LatentStream
from rdm_scale.diffusion import build_objective
from rdm_scale.diffusion.training_draws import draw
from rdm_scale.models import build_model
from tests.support.small_runs import metrics


class Reference(NamedTuple):
    """Losses and gradient norms by step, last weights and EMA weights."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    ema: dict[str, Tensor]


def plain_training(config: RunConfig) -> Reference:
    """Train with a plain loop: AdamW, clipping, warm-up and EMA, without any training code of the project."""
    options = config.optimizer
    model = build_model(config.model, config.train.seed)
    average = copy.deepcopy(model)
    groups = [complete_p(config, name, p) for name, p in model.named_parameters()]
    adamw = torch.optim.AdamW(groups, betas=options.betas, foreach=False)
    peaks = [group["lr"] for group in groups]
    how = read_manifest(config.data.train[0].path)[0].text
    batches = iter(
        LatentStream(
            config.data.train,
            global_batch_size=config.train.global_batch_size,
            seed=config.train.seed,
            captions=how is not None,
        )
    )
    losses, norms = [], []
    for step in range(1, config.train.steps + 1):
        batch = draw(
            next(batches),
            objective=build_objective(config.diffusion, False),
            seed=config.train.seed,
            num_classes=config.model.num_classes if how is None else None,
            empty_caption=None if how is None else empty_caption(how),
            condition_dropout=config.diffusion.condition_dropout,
        )
        t = batch.t.view(-1, 1, 1, 1, 1)
        prediction = model((1 - t) * batch.latents + t * batch.noise, 1000 * batch.t, batch.condition)
        loss = ((prediction - (batch.noise - batch.latents)) ** 2).mean()
        adamw.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), options.grad_clip)))
        for group, peak in zip(adamw.param_groups, peaks, strict=True):
            group["lr"] = peak * min(1.0, step / options.warmup_steps)
        adamw.step()
        decay = min(options.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
                mean.mul_(decay).add_(weight, alpha=1 - decay)
        losses.append(loss.item())
    return Reference(losses, norms, dict(model.named_parameters()), dict(average.named_parameters()))


def complete_p(config: RunConfig, name: str, parameter: Tensor) -> dict[str, Any]:
    """Parameter group of one parameter, with the rates of CompleteP's table for its name and shape.

    Without a base the rates are those of the configuration. Class embeddings, gates and biases have no weight decay.
    """
    options, model = config.optimizer, config.model
    skips = model.stacking == "u"  # one for every two blocks
    base, branches = (2 * n + n // 2 * skips for n in (model.base_depth or model.depth, model.depth))
    w, r = model.hidden_size / (model.base_width or model.hidden_size), base / branches
    decays = parameter.dim() == 2 and not name.startswith("class_embed")
    hidden = decays and parameter.shape[1] in (model.hidden_size, 2 * model.hidden_size, model.mlp_size)
    last, in_block = name.startswith("head.out"), name.startswith("blocks")
    return {
        "params": [parameter],
        "lr": options.lr / (w if hidden else 1),
        "weight_decay": (options.weight_decay if decays else 0.0) * (w if hidden else 1),
        "eps": options.eps / (1 if last else w) * (r if in_block else 1),
    }


class Deviation(NamedTuple):
    """Largest relative differences from the reference."""

    loss: float
    norm: float
    weights: float
    ema: float

    def check(self) -> None:
        """The bounds of a layout that computes the same in fp32."""
        assert self.loss < 1e-5 and self.norm < 1e-5, self
        assert self.weights < 1e-4 and self.ema < 1e-4, self


def deviation(config: RunConfig, reference: Reference) -> Deviation:
    """Deviation of a finished run."""
    records = metrics(Path(config.run.dir))
    assert [r["step"] for r in records] == list(range(1, len(reference.losses) + 1))
    return Deviation(
        max(abs(r["loss"] / loss - 1) for r, loss in zip(records, reference.losses, strict=True)),
        max(abs(r["grad_norm"] / norm - 1) for r, norm in zip(records, reference.norms, strict=True)),
        largest_distance(config.run.dir, "weights", reference.weights),
        largest_distance(config.run.dir, "ema", reference.ema),
    )


def largest_distance(run_dir: str, kind: Literal["weights", "ema"], expected: dict[str, Tensor]) -> float:
    """Largest distance of a tensor relative to its norm (or to 1e-3 where that is smaller: gates and biases at 0)."""
    found = load_model(run_dir, kind).named_parameters()
    distances = {name: (p - expected[name]).norm() / expected[name].norm().clamp(min=1e-3) for name, p in found}
    return max(distance.item() for distance in distances.values())
